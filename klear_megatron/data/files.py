"""Reading the rows of data files as they are."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from klear_megatron.errors import UserError

Row = dict[str, Any]


def stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Sizes in bytes and times in ns, which change when a file is replaced under the same name."""
    existing = [file for file in sorted(files) if file.is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in existing}


def read_rows(path: Path | Sequence[Path]) -> Iterator[tuple[str, Row | str]]:
    """Streams the rows of one or several data sets, one after another.

    Args:
        path: each is a .jsonl or .parquet file, a folder of such files, or a data set on the hub.

    Yields:
        The row's location, for messages, and the row; or the error if it is not a valid row.

    Raises:
        UserError: a file or data set does not exist, cannot be read or has no rows.
    """
    for one in [path] if isinstance(path, Path) else path:
        empty = True
        for where_and_row in _read(one):
            empty = False
            yield where_and_row
        if empty:
            raise UserError(f"{one}: the data file has no rows")


def _read(path: Path) -> Iterator[tuple[str, Row | str]]:
    if path.suffix == ".jsonl":
        return _read_jsonl(_existing(path))
    if path.suffix == ".parquet":
        return _read_dataset(_existing(path), "parquet", data_files=str(path))
    if path.is_dir() or _is_hub_name(path):
        return _read_dataset(path, str(path))
    raise UserError(
        f"{path}: cannot read this kind of file; give a .jsonl or .parquet file, a folder of them, "
        "or the name of a data set on the Hugging Face hub (owner/name)"
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such data file; check the path")
    return path


def _is_hub_name(path: Path) -> bool:
    return len(path.parts) == 2 and not path.is_absolute() and not path.exists()


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row | str]]:
    # `datasets` could read this too, but it neither keeps line numbers nor lets the type of
    # ground_truth differ from row to row.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line)


def _parse(line: bytes) -> Row | str:
    try:
        row = from_json(line)
    except ValueError as error:
        # Each row is parsed alone, so the parser always says "line 1"; leave that out.
        return "Invalid JSON: " + str(error).replace(" at line 1 column", " at column")
    return row if isinstance(row, dict) else "A row should be an object"


def _read_dataset(path: Path, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Row | str]]:
    # Late: importing it takes two seconds, and JSONL does not need it.
    from datasets import load_dataset

    try:
        # Streaming reads the files themselves; otherwise a converted copy is left in the user's
        # home.
        splits = load_dataset(*args, streaming=True, **kwargs)
    except (ValueError, OSError) as error:
        kind = "not a Parquet file" if kwargs else "no data set that can be read"
        raise UserError(f"{path}: {kind} ({error})") from error
    if "train" not in splits and len(splits) > 1:
        raise UserError(f"{path}: no split named train, but {', '.join(splits)}; use its files")
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row
