"""Filters that decide, prompt by prompt, whether to keep it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from klear_megatron.curation.config import (
    CurateConfig,
    DecontaminationConfig,
    EvaluationSetConfig,
)
from klear_megatron.curation.text import digest, ngrams, query_of, words_of
from klear_megatron.data import Prompt
from klear_megatron.data.rows import parse_prompt, parse_rows
from klear_megatron.errors import UserError
from klear_megatron.observability import say
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
    """Counts the tests in the ground truth of a programming problem.

    Raises:
        UserError: the ground truth has no tests.
    """
    if verifier_of(prompt.data_source) != "code":
        return None
    return len(parse_tests(prompt.ground_truth))


Filter = Callable[[Candidate], str | None]
"""Why a candidate is dropped; None where it is not."""


def make_filters(config: CurateConfig) -> dict[str, Filter]:
    """Makes the filters, keyed by the reason for dropping, in the order in which they run."""
    filters: dict[str, Filter] = {}
    if config.min_tests is not None:
        filters["too few tests"] = _min_tests(config.min_tests)
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


def _read(config: EvaluationSetConfig) -> Iterator[Prompt]:
    bad_rows: list[UserError] = []
    skip = bad_rows.append if config.bad_rows == "skip" else None
    parse = partial(parse_prompt, columns=config)
    rows = parse_rows(config.path, parse, skip, subset=config.subset, split=config.split)
    yield from (prompt for _, prompt in rows)
    if bad_rows:
        say(f"curate.decontaminate: {len(bad_rows)} malformed rows skipped; {bad_rows[0]}")


def _decontaminate(config: DecontaminationConfig) -> Filter:
    seen: dict[str, str] = {}
    for one in config.against:
        problems = {query_of(prompt): prompt.index for prompt in _read(one)}
        grams_of = {index: ngrams(words_of(query), config.n) for query, index in problems.items()}
        shared = Counter(gram for grams in grams_of.values() for gram in grams)
        for index, grams in grams_of.items():
            where = f"{', '.join(map(str, one.paths))}, row {index}"
            seen |= {gram: where for gram in grams if shared[gram] <= config.boilerplate}

    def drop(candidate: Candidate) -> str | None:
        for gram in ngrams(candidate.words, config.n):
            if gram in seen:
                return f"{gram!r} is in {seen[gram]}"
        return None

    return drop
