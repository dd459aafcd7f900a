"""Draws a teacher's responses to the prompts of a file from SGLang servers, and grades them."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.hub import local_model
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.curation.config import TeacherConfig
from klear_megatron.curation.text import digest, query_of
from klear_megatron.data import Prompt
from klear_megatron.data.encoding import encode_prompt
from klear_megatron.data.files import stamps
from klear_megatron.evaluation.benchmark import add_rewards
from klear_megatron.evaluation.preflight import check_prompts
from klear_megatron.evaluation.responses import ungraded_row, write_rows
from klear_megatron.evaluation.scores import Row
from klear_megatron.evaluation.stored import RESPONSES, append_row, claim, stored_rows
from klear_megatron.models.tokenizer import decode_response
from klear_megatron.observability import Progress, say
from klear_megatron.rewards import RewardPool
from klear_megatron.rollout import Response
from klear_megatron.rollout.generation import generating

_GRADED_AT_ONCE = 1024

Prompts = Callable[[], Iterator[Prompt]]
"""Reads the prompts again from the first one on."""


def ask(teacher: TeacherConfig, prompts: Prompts, folder: Path) -> Path:
    """Draws the responses still missing from `samples_per_prompt` per prompt, and grades them.

    Each response is stored as it arrives, so an interrupted run continues where it stopped.

    Args:
        prompts: equal ones share their responses.
        folder: receives the responses and the servers' logs.

    Returns:
        The file of graded responses, in the format that `klear-megatron eval` writes.

    Raises:
        UserError: a prompt cannot be graded, the model is bad, a server fails, or the folder holds
            another teacher's responses.
    """
    teacher = teacher.model_copy(update={"model": local_model(teacher.model)})
    settings = teacher.model_dump(mode="json", include={"model", "sampling", "seed"})
    claim(folder, settings | {"weights": stamps(teacher.model.glob("*.safetensors"))})
    path = folder / RESPONSES
    drawn: Counter[bytes] = Counter()
    write_rows(path, _counted(folder, drawn))  # drops a half-written last line
    model = ModelFolder(teacher.model)
    missing = _missing(teacher, model.tokenizer, prompts, drawn)
    stored = drawn.total()
    if missing:
        if stored:
            say(f"going on: {stored} of {stored + missing.total()} responses are in {folder}")
        _draw(teacher, model, prompts, folder, missing, stored)
    with (
        RewardPool(teacher.rewards) as rewards,
        Progress("grade", stored + missing.total()) as progress,
    ):
        write_rows(path, _graded(folder, rewards, progress))
    return path


def _counted(folder: Path, drawn: Counter[bytes]) -> Iterator[Row]:
    for row in stored_rows(folder):
        drawn[digest(query_of(Prompt("", row["prompt"], "", 0)))] += 1
        yield row


def _missing(
    teacher: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    drawn: Counter[bytes],
) -> Counter[bytes]:
    """The number of responses still to draw for each prompt, keyed by the digest of its query."""
    missing: Counter[bytes] = Counter()
    for prompt in prompts():
        key = digest(query_of(prompt))
        if len(encode_prompt(tokenizer, prompt.messages)) <= teacher.max_prompt_length:
            missing[key] = teacher.samples_per_prompt - drawn[key]
    return +missing


def _draw(
    teacher: TeacherConfig,
    model: ModelFolder,
    prompts: Prompts,
    folder: Path,
    missing: Counter[bytes],
    stored: int,
) -> None:
    rollout = teacher.rollout
    longest = teacher.max_prompt_length
    check_prompts(prompts(), longest, model.config, rollout, teacher.sampling, teacher.rewards)
    asked: dict[int, Prompt] = {}
    logs = folder / "logs"
    with (
        generating(model, rollout, logs, seed=teacher.seed, drawn_before=stored) as generator,
        Progress("teacher", stored + missing.total(), start=stored) as progress,
    ):

        def token_ids() -> Iterator[list[int]]:
            for i, (prompt, ids) in enumerate(_wanted(model.tokenizer, prompts, missing)):
                asked[i] = prompt
                yield ids

        def store(i: int, responses: list[Response]) -> None:
            text = decode_response(model.tokenizer, responses[0].token_ids)
            append_row(folder, ungraded_row(asked.pop(i), text, responses[0]))
            progress.advance()

        generator.stream(token_ids(), teacher.sampling, store)


def _wanted(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, missing: Counter[bytes]
) -> Iterator[tuple[Prompt, list[int]]]:
    """Yields each prompt and its token ids once per missing response."""
    left = dict(missing)
    for prompt in prompts():
        if count := left.pop(digest(query_of(prompt)), 0):
            yield from [(prompt, encode_prompt(tokenizer, prompt.messages))] * count


def _graded(folder: Path, rewards: RewardPool, progress: Progress) -> Iterator[Row]:
    rows = stored_rows(folder)
    while batch := list(islice(rows, _GRADED_AT_ONCE)):
        add_rewards([row for row in batch if row["reward"] is None], rewards)
        progress.advance(len(batch))
        yield from batch
