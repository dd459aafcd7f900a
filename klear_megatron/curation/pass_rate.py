"""Drops the prompts that a teacher solves too rarely or too often."""

from array import array
from collections.abc import Iterator
from pathlib import Path

from klear_megatron.curation.config import PassRateConfig
from klear_megatron.curation.teacher import Prompts, ask
from klear_megatron.curation.text import digest, query_of
from klear_megatron.data import Prompt
from klear_megatron.data.files import read_rows
from klear_megatron.errors import UserError


def why_dropped(config: PassRateConfig, prompts: Prompts, folder: Path) -> Iterator[str | None]:
    """Returns the reason for dropping each prompt, or None to keep it.

    Args:
        folder: receives the teacher's responses, if there is a teacher.

    Raises:
        UserError: the responses are not graded, or the teacher cannot be asked.
    """
    teacher = config.teacher
    counts: dict[bytes, array[int]] = {}
    for path in (ask(teacher, prompts, folder),) if teacher else config.responses:
        _count_correct(path, counts)
    for prompt in prompts():
        correct, total = counts.get(digest(query_of(prompt)), (0, 0))
        if total == 0:
            yield "no responses"
        elif config.above < correct / total <= config.at_most:
            yield None
        else:
            yield f"{correct} of {total} responses correct"


def _count_correct(path: Path, counts: dict[bytes, "array[int]"]) -> None:
    for where, row in read_rows(path):
        try:
            if isinstance(row, str):
                raise TypeError(row)
            query = query_of(Prompt("", row["prompt"], "", 0))
            correct = bool(row["reward"]["correct"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{where}: no graded response; curate.pass_rate.responses takes the "
                "responses.jsonl that `klear-megatron eval` writes"
            ) from error
        count = counts.setdefault(digest(query), array("i", [0, 0]))
        count[0] += correct
        count[1] += 1
