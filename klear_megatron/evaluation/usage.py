"""What the drawing of an evaluation's responses uses."""

import time
from collections.abc import Sequence
from pathlib import Path

from klear_megatron.evaluation.benchmark import Benchmark
from klear_megatron.evaluation.scores import Row
from klear_megatron.observability import append_usage
from klear_megatron.platform.device import usable_cores
from klear_megatron.rollout.servers import count_devices


class DrawingUsage:
    """A context manager that adds a line to usage.jsonl at its end.

    Args:
        urls: of the servers.
    """

    def __init__(self, run_dir: Path, benchmarks: Sequence[Benchmark], urls: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._servers = count_devices(urls)
        self._begin = time.monotonic()
        self._prompt_lengths = {
            (benchmark.name, prompt.index): len(ids)
            for benchmark in benchmarks
            for prompt, ids in zip(
                benchmark.loaded.prompts, benchmark.loaded.token_ids, strict=True
            )
        }
        self._tokens = self._sequence_tokens = self._squares = 0

    def add(self, benchmark: Benchmark, row: Row) -> None:
        """Counts a response."""
        length = self._prompt_lengths[benchmark.name, row["index"]] + row["tokens"]
        self._tokens += row["tokens"]
        self._sequence_tokens += length
        self._squares += length * length

    def __enter__(self) -> "DrawingUsage":
        return self

    def __exit__(self, *exception: object) -> None:
        append_usage(
            self._run_dir,
            ranks={},
            cores=usable_cores(),
            servers=self._servers,
            seconds=round(time.monotonic() - self._begin, 3),
            tokens=self._tokens,
            sequence_tokens=self._sequence_tokens,
            sequence_squares=self._squares,
        )
