"""Choosing the prompts to train on from raw data sets."""

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from klear_megatron.checkpoints.hub import local_model
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.curation.config import CurateConfig, SubsetConfig, TopSourcesConfig
from klear_megatron.curation.filters import Candidate, count_tests, make_filters
from klear_megatron.curation.k_center import k_center_greedy
from klear_megatron.curation.pass_rate import why_dropped
from klear_megatron.curation.text import DIMENSIONS, hashed_vector
from klear_megatron.data import Prompt
from klear_megatron.data.files import Row, check_paths
from klear_megatron.data.rows import parse_prompt, parse_rows
from klear_megatron.errors import UserError
from klear_megatron.evaluation.preflight import check_rewards
from klear_megatron.platform.files import make_folder, write_atomically

Drop = Callable[[int | None, str, str], None]
"""Called for a dropped row with its number, the kind of reason, and the reason itself."""


@dataclass
class CurationReport:
    """The number of rows read, dropped by reason, and kept by source."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Dropped rows by reason."""
    sources: Counter[str] = field(default_factory=Counter)
    """Kept rows by data_source, or by the field that top_sources names."""


def curate(config: CurateConfig) -> CurationReport:
    """Writes the kept rows, the dropped rows with the reason for each, and a report.

    Rows are streamed. Memory holds a digest of each row, plus a vector of each if a subset is
    selected.

    Raises:
        UserError: the data cannot be read, the teacher cannot be asked, or every row was dropped.
    """
    _check_before_reading(config)
    make_folder(config.output.parent)
    report = CurationReport()
    spool = config.output.with_suffix(".partial.jsonl")

    def spooled() -> Iterator[Prompt]:
        return (prompt for _, prompt in parse_rows(spool, partial(parse_prompt, columns=config)))

    with _dropped_rows(config.output, report) as drop:
        survivors = _filter(config, spool, report, drop)
        kept = np.ones(len(survivors.rows), dtype=bool)
        if config.pass_rate is not None and survivors.rows:
            folder = config.output.with_suffix(".teacher")
            for i, why in enumerate(why_dropped(config.pass_rate, spooled, folder)):
                if why is not None:
                    kept[i] = False
                    drop(survivors.rows[i], "pass rate", why)
        if config.top_sources is not None:
            of_best = kept & _of_top_sources(config.top_sources, survivors, kept)
            _tell(drop, survivors, kept & ~of_best, "not a top source")
            kept = of_best
        if config.subset is not None:
            chosen = kept & _of_subset(config.subset, survivors, kept)
            _tell(drop, survivors, kept & ~chosen, "not in the subset")
            kept = chosen
    if not kept.any():
        raise UserError(f"curate: nothing is left; {config.output} would be empty. {report}")
    report.kept = int(kept.sum())
    report.sources = Counter(
        survivors.source_names[source] for source in np.array(survivors.sources)[kept]
    )
    _copy(spool, config.output, kept)
    numbers = json.dumps(vars(report), indent=2, ensure_ascii=False)
    config.output.with_suffix(".report.json").write_text(numbers + "\n")
    return report


def _check_before_reading(config: CurateConfig) -> None:
    """Checks what can be known before rows are read, which may take long."""
    check_paths(config.path)
    for one in config.decontaminate.against if config.decontaminate is not None else ():
        check_paths(one.path, one.subset, one.split)
    if config.pass_rate is not None and config.pass_rate.teacher is not None:
        teacher = config.pass_rate.teacher
        check_rewards(ModelFolder(local_model(teacher.model)).tokenizer, teacher.rewards)


@dataclass
class _Survivors:
    """A record of each row that passed the filters, in the order of the spooled rows."""

    rows: "array[int]" = field(default_factory=lambda: array("q"))
    """Number among the rows read."""
    sources: "array[int]" = field(default_factory=lambda: array("i"))
    """Number of its source in `source_names`."""
    source_names: list[str] = field(default_factory=list)
    vectors: bytearray = field(default_factory=bytearray)
    """[rows, DIMENSIONS] float32, where a subset is selected by them."""


def _filter(config: CurateConfig, spool: Path, report: CurationReport, drop: Drop) -> _Survivors:
    survivors = _Survivors()
    filters = make_filters(config)
    wants_vectors = config.subset is not None and config.subset.embeddings is None
    source_field = config.top_sources.field if config.top_sources else "data_source"
    numbers: dict[str, int] = {}
    with spool.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for row, candidate in _candidates(config, report, drop):
            for reason, why_drop in filters.items():
                why = why_drop(candidate)
                if why is not None:
                    drop(candidate.prompt.index, reason, why)
                    break
            else:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                survivors.rows.append(candidate.prompt.index)
                source = str(row.get(source_field, candidate.prompt.data_source))
                survivors.sources.append(numbers.setdefault(source, len(numbers)))
                if wants_vectors:
                    survivors.vectors += hashed_vector(candidate.words).tobytes()
    survivors.source_names = list(numbers)
    return survivors


def _candidates(
    config: CurateConfig, report: CurationReport, drop: Drop
) -> Iterator[tuple[Row, Candidate]]:
    def parse(row: Row, index: int) -> Candidate:
        prompt = parse_prompt(row, index, config)
        return Candidate(prompt, count_tests(prompt))

    def skip(error: UserError) -> None:
        report.rows += 1
        drop(None, "malformed", str(error))

    on_bad_row = skip if config.bad_rows == "skip" else None
    for row, candidate in parse_rows(config.path, parse, on_bad_row):
        report.rows += 1
        yield row, candidate


@contextlib.contextmanager
def _dropped_rows(output: Path, report: CurationReport) -> Iterator[Drop]:
    """Yields a function that records and counts a dropped row."""

    def drop(index: int | None, reason: str, why: str) -> None:
        report.dropped[reason] += 1
        json.dump({"row": index, "reason": reason, "why": why}, file, ensure_ascii=False)
        file.write("\n")

    file: TextIO
    with output.with_suffix(".dropped.jsonl").open("w", errors="surrogatepass") as file:
        yield drop


def _tell(drop: Drop, survivors: _Survivors, dropped: NDArray[np.bool_], reason: str) -> None:
    for i in np.flatnonzero(dropped):
        drop(survivors.rows[i], reason, survivors.source_names[survivors.sources[i]])


def _of_top_sources(
    config: TopSourcesConfig, survivors: _Survivors, among: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    sources = np.array(survivors.sources)
    names = survivors.source_names
    unknown = set(config.ranking) - set(names)
    if unknown:
        raise UserError(
            f"curate.top_sources.ranking: no row has {config.field} = {', '.join(sorted(unknown))};"
            f" there are: {', '.join(sorted(names))}"
        )
    if config.ranking:
        best = [names.index(name) for name in config.ranking[: config.count]]
    else:
        counts = np.bincount(sources[among], minlength=len(names))
        best = list(np.argsort(-counts, kind="stable")[: config.count])
    return np.isin(sources, best)


def _of_subset(
    config: SubsetConfig, survivors: _Survivors, among: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    candidates = np.flatnonzero(among)
    if config.embeddings is None:
        vectors = np.frombuffer(survivors.vectors, np.float32).reshape(-1, DIMENSIONS)
        vectors = vectors if among.all() else vectors[candidates]
    else:
        stored = np.load(config.embeddings, mmap_mode="r")
        numbers = np.array(survivors.rows)[candidates]
        if numbers.size and numbers.max() >= len(stored):
            raise UserError(
                f"curate.subset.embeddings: {config.embeddings} has {len(stored)} vectors, fewer "
                "than there are rows; make one for each row"
            )
        vectors = np.asarray(stored[numbers], np.float32)
    chosen = np.zeros(len(among), dtype=bool)
    if config.size >= len(candidates):
        chosen[candidates] = True
    else:
        chosen[candidates[k_center_greedy(vectors, config.size, config.seed)]] = True
    return chosen


def _copy(spool: Path, output: Path, kept: Iterable[bool]) -> None:
    """Moves the kept rows into place; `output` appears once all of them are there."""
    with spool.open(encoding="utf-8", newline="\n") as source, write_atomically(output) as target:
        target.writelines(line for line, keep in zip(source, kept, strict=True) if keep)
    spool.unlink()
