"""The rollouts of a run's steps on the disk; docs/rollouts.md describes the files."""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from klear_megatron.errors import UserError
from klear_megatron.platform.files import replace_atomically, write_atomically

_NAME = re.compile(r"step_(\d+)_(\d+)(\.tokens\.jsonl\.gz|\.jsonl)")
_TEXT, _TOKENS = ".jsonl", ".tokens.jsonl.gz"
_COMPRESSION = 1
"""gzip's fastest, because a step waits for it."""


class RolloutFiles:
    """The files under `rollouts/` of a run: one with the texts of each step and leader, and for the
    newest steps one with the tokens. Line by line, both are about the same responses.

    Which steps there are is looked up once, and again after writing or forgetting some."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "rollouts"

    def write_texts(self, step: int, leader: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """A row is one graded response; see `response_row`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.__dict__.pop("_texts", None)
        with write_atomically(self._path(step, leader, _TEXT)) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write_tokens(self, step: int, leader: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """A row is one response's tokens, in the order of `write_texts`."""
        with (
            replace_atomically(self._path(step, leader, _TOKENS)) as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_COMPRESSION, mtime=0) as packed,
        ):
            for row in rows:
                packed.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def steps(self) -> list[int]:
        """The steps that have texts."""
        return list(self._texts)

    def read_texts(self, step: int) -> Iterator[dict[str, Any]]:
        """The responses of a step, leader by leader, without their tokens.

        Raises:
            UserError: the step has no rollouts.
        """
        for path in self._texts_of(step):
            with path.open(encoding="utf-8", newline="\n") as texts:
                yield from map(json.loads, texts)

    def read(self, step: int) -> Iterator[dict[str, Any]]:
        """The responses of a step, leader by leader: the texts' keys, and where the tokens were
        kept, theirs.

        Raises:
            UserError: the step has no rollouts.
        """
        for path in self._texts_of(step):
            tokens = path.with_name(path.name.removesuffix(_TEXT) + _TOKENS)
            with path.open(encoding="utf-8", newline="\n") as texts:
                rows = map(json.loads, texts)
                if not tokens.exists():
                    yield from rows
                    continue
                with gzip.open(tokens, "rt", encoding="utf-8") as packed:
                    for row, more in zip(rows, map(json.loads, packed), strict=True):
                        yield row | more

    def _texts_of(self, step: int) -> list[Path]:
        if step not in self._texts:
            raise UserError(f"{self.folder}: no rollouts of step {step}; there are {self._range()}")
        return self._texts[step]

    @cached_property
    def _texts(self) -> dict[int, list[Path]]:
        """The files with texts of each step, leader by leader."""
        texts: dict[int, list[Path]] = {}
        for step, _, end, path in self._all():
            if end == _TEXT:
                texts.setdefault(step, []).append(path)
        return texts

    def forget(self, from_step: int) -> None:
        """Removes what a run wrote from this step on, before it was resumed: another number of
        leaders would not replace it all."""
        self.__dict__.pop("_texts", None)
        for step, _, _, path in self._all():
            if step >= from_step:
                path.unlink()

    def forget_tokens(self, before: int) -> None:
        """Removes the tokens of older steps."""
        for step, _, end, path in self._all():
            if step < before and end == _TOKENS:
                path.unlink(missing_ok=True)

    def _path(self, step: int, leader: int, end: str) -> Path:
        return self.folder / f"step_{step:08}_{leader}{end}"

    def _all(self) -> list[tuple[int, int, str, Path]]:
        """Step, leader, end of the name and path of each file, in this order."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        found = ((_NAME.fullmatch(path.name), path) for path in paths)
        return sorted((int(m[1]), int(m[2]), m[3], path) for m, path in found if m)

    def _range(self) -> str:
        steps = self.steps()
        return f"those of steps {steps[0]} to {steps[-1]}" if steps else "none"
