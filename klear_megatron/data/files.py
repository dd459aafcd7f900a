"""Reading the rows of data files as they are."""

import codecs
import csv
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from klear_megatron.errors import UserError

Row = dict[str, Any]
_HUB_TIMEOUT_S = 10.0


def stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Sizes in bytes and times in ns, which change when a file is replaced under the same name."""
    existing = [file for file in sorted(files) if file.is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in existing}


def read_rows(
    path: Path | Sequence[Path], subset: str | None = None, split: str | None = None
) -> Iterator[tuple[str, Row | str]]:
    """Streams the rows of one or several data sets, one after another.

    Args:
        path: each is a .jsonl, .json, .csv or .parquet file, a folder of such files, or a data set
            on the hub.
        subset: of the data sets on the hub.
        split: of the data sets on the hub and the folders; by default train, or the only one.

    Yields:
        The row's location, for messages, and the row; or the error if it is not a valid row.

    Raises:
        UserError: a file or data set does not exist, cannot be read or has no rows.
    """
    check_paths(path, subset, split)
    for one in [path] if isinstance(path, Path) else path:
        empty = True
        for where_and_row in _read(one, subset, split):
            empty = False
            yield where_and_row
        if empty:
            raise UserError(f"{one}: the data file has no rows")


def check_paths(
    path: Path | Sequence[Path], subset: str | None = None, split: str | None = None
) -> None:
    """Checks that there are such data sets, before one is read; see `read_rows`.

    Raises:
        UserError: a file or data set does not exist, or is of another kind than can be read.
    """
    for one in [path] if isinstance(path, Path) else path:
        _check(one, subset, split)


def _read(path: Path, subset: str | None, split: str | None) -> Iterator[tuple[str, Row | str]]:
    if path.suffix in _READERS and not path.is_dir():
        return _READERS[path.suffix](path)
    return _read_dataset(path, split, str(path), subset)


def _check(path: Path, subset: str | None, split: str | None) -> None:
    if path.is_dir():
        return
    if path.suffix in _READERS:
        if not path.is_file():
            raise UserError(f"{path}: no such data file; check the path")
        if subset or split:
            raise UserError(f"{path}: a file has no subset or split; leave those settings out")
        return
    if path.exists() or len(path.parts) != 2 or path.is_absolute() or Path(path.parts[0]).exists():
        raise UserError(
            f"{path}: cannot be read: {'this kind of file' if path.exists() else 'no such folder'}"
            " is not known; give a .jsonl, .json, .csv or .parquet file, a folder of them, or the "
            "name of a data set on the Hugging Face hub (owner/name)"
        )
    _check_hub(str(path))


@functools.cache
def _check_hub(name: str) -> None:
    """Raises UserError if there is no such data set, within seconds: loading would try for long."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such folder here, and no data set of that name on the Hugging Face hub "
            "that you may read"
        ) from error
    except Exception as error:  # the network's, the client's, and the hub's own errors
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face hub cannot be asked for a data set "
            f"of that name: {error}"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row | str]]:
    # `datasets` could read this too, but it neither keeps line numbers nor lets the type of
    # ground_truth differ from row to row.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}, line {number}", _parse(line)


def _parse(line: bytes) -> Row | str:
    try:
        row = from_json(line)
    except ValueError as error:
        # Each row is parsed alone, so the parser always says "line 1"; leave that out.
        return "Invalid JSON: " + str(error).replace(" at line 1 column", " at column")
    return _row(row)


def _row(row: Any) -> Row | str:
    return row if isinstance(row, dict) else "A row should be an object"


def _read_json(path: Path) -> Iterator[tuple[str, Row | str]]:
    """One array of rows; or a row a line, which is often called .json as well."""
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8)
    if not start.lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        rows = from_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise UserError(f"{path}: Invalid JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _row(row)


def _read_csv(path: Path) -> Iterator[tuple[str, Row | str]]:
    csv.field_size_limit(sys.maxsize)  # a solution may be longer than the default
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                whole = None not in row and None not in row.values()
                wrong = "The row has another number of fields than the first line names"
                yield f"{path}, line {reader.line_num}", row if whole else wrong
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}; save it in that encoding") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | str]]:
    return _read_dataset(path, None, "parquet", data_files=str(path))


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_dataset(
    path: Path, split: str | None, *args: Any, **kwargs: Any
) -> Iterator[tuple[str, Row | str]]:
    # Late: importing it takes two seconds, and JSONL does not need it.
    from datasets import load_dataset

    try:
        # Streaming reads the files themselves; otherwise a converted copy is left in the user's
        # home.
        splits = load_dataset(*args, streaming=True, **kwargs)
    except (ValueError, OSError) as error:
        kind = "not a Parquet file" if kwargs else "no data set that can be read"
        raise UserError(f"{path}: {kind} ({error})") from error
    if split is None:
        split = "train" if len(splits) > 1 else next(iter(splits))
    if split not in splits:
        raise UserError(
            f"{path}: no split named {split}, but {', '.join(splits)}; set split to one of them"
        )
    for number, row in enumerate(splits[split], start=1):
        yield f"{path}, row {number}", row
