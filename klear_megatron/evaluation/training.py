"""Evaluation of a policy while it is trained, on the servers that it is trained with."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from klear_megatron.evaluation.benchmark import Benchmark, draw, grade
from klear_megatron.evaluation.responses import write_rows
from klear_megatron.evaluation.scores import Row, Scores, by_problem, score
from klear_megatron.observability import Progress
from klear_megatron.rewards import RewardPool
from klear_megatron.rollout import Generator, SamplingConfig


def evaluate_policy(
    benchmarks: Sequence[Benchmark],
    generator: Generator,
    rewards: RewardPool,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingConfig,
    dump_dir: Path,
) -> dict[str, Scores]:
    """Draws and grades all samples with the weights that the servers have now.

    Not collective: one rank calls it, while no weights are pushed.

    Args:
        dump_dir: gets a `NAME.jsonl` per benchmark, of its graded responses.

    Returns:
        The scores of each benchmark.

    Raises:
        GenerationError: servers refused a request, or are lost.
    """
    rows: dict[str, list[Row]] = {benchmark.name: [] for benchmark in benchmarks}
    asked = [
        (benchmark, i)
        for benchmark in benchmarks
        for i in range(len(benchmark.loaded.prompts))
        for _ in range(benchmark.samples_per_problem)
    ]
    with Progress("  evaluate", len(asked), keep=False) as progress:

        def store(benchmark: Benchmark, row: Row) -> None:
            rows[benchmark.name].append(row)
            progress.advance()

        draw(asked, generator, tokenizer, sampling, store)
    grade(list(chain.from_iterable(rows.values())), rewards, keep_progress=False)
    dump_dir.mkdir(parents=True, exist_ok=True)
    scores = {}
    for name, of_one in rows.items():
        problems = by_problem(of_one)
        write_rows(dump_dir / f"{name}.jsonl", chain.from_iterable(problems.values()))
        scores[name] = score(problems)
    return scores
