"""What decides of a prompt whether it is kept, one prompt at a time."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from klear_megatron.curation.config import CurateConfig, DecontaminationConfig, PassRateConfig
from klear_megatron.curation.text import digest, ngrams, query_of, words_of
from klear_megatron.data import Prompt, read_prompts
from klear_megatron.data.files import read_rows
from klear_megatron.errors import UserError
from klear_megatron.rewards.code_tests import parse_tests
from klear_megatron.rewards.graders import verifier_of


@dataclass(frozen=True)
class Candidate:
    prompt: Prompt
    num_tests: int | None
    """None where responses are no programs."""

    @cached_property
    def query(self) -> str:
        return query_of(self.prompt)

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.query)


def count_tests(prompt: Prompt) -> int | None:
    """Raises UserError where the ground truth of a programming problem has no tests."""
    if verifier_of(prompt.data_source) != "code":
        return None
    return len(parse_tests(prompt.ground_truth))


Filter = Callable[[Candidate], str | None]
"""Why a candidate is dropped; None where it is not."""


def make_filters(config: CurateConfig) -> dict[str, Filter]:
    """By the reason they drop for, in the order in which they are asked."""
    filters: dict[str, Filter] = {}
    if config.min_tests is not None:
        filters["too few tests"] = _min_tests(config.min_tests)
    if config.pass_rate is not None:
        filters["pass rate"] = _pass_rate(config.pass_rate)
    if config.decontaminate is not None:
        filters["contaminated"] = _decontaminate(config.decontaminate)
    if config.deduplicate:
        # Last, so that of several equal prompts one that passes the other filters is kept.
        filters["duplicate"] = _deduplicate()
    return filters


def _min_tests(minimum: int) -> Filter:
    def drop(candidate: Candidate) -> str | None:
        if candidate.num_tests is None or candidate.num_tests >= minimum:
            return None
        return f"{candidate.num_tests} tests"

    return drop


def _deduplicate() -> Filter:
    first: dict[bytes, int] = {}

    def drop(candidate: Candidate) -> str | None:
        index = candidate.prompt.index
        earlier = first.setdefault(digest(candidate.query), index)
        return None if earlier == index else f"of row {earlier}"

    return drop


def _decontaminate(config: DecontaminationConfig) -> Filter:
    seen: dict[str, str] = {}
    for path in config.against:
        problems = {query_of(prompt): prompt.index for prompt in read_prompts(path)}
        grams_of = {index: ngrams(words_of(query), config.n) for query, index in problems.items()}
        shared = Counter(gram for grams in grams_of.values() for gram in grams)
        for index, grams in grams_of.items():
            where = f"{path}, row {index}"
            seen |= {gram: where for gram in grams if shared[gram] <= config.boilerplate}

    def drop(candidate: Candidate) -> str | None:
        for gram in ngrams(candidate.words, config.n):
            if gram in seen:
                return f"{gram!r} is in {seen[gram]}"
        return None

    return drop


def _pass_rate(config: PassRateConfig) -> Filter:
    counts: dict[bytes, array[int]] = {}
    for path in config.responses:
        _count_correct(path, counts)

    def drop(candidate: Candidate) -> str | None:
        correct, total = counts.get(digest(candidate.query), (0, 0))
        if total == 0:
            return "no responses"
        if config.above < correct / total <= config.at_most:
            return None
        return f"{correct} of {total} responses correct"

    return drop


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
