"""Evaluations of the policy between steps of its training, on the same servers."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.evaluation.benchmark import (
    Benchmark,
    check_benchmarks,
    draw,
    grade,
    load_benchmarks,
)
from klear_megatron.evaluation.responses import write_rows
from klear_megatron.evaluation.scores import Row, Scores, by_problem, score
from klear_megatron.observability import Phases, Progress, say
from klear_megatron.platform import objects
from klear_megatron.rewards import RewardPool
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import GroupMaker
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rollout import Generator, SamplingConfig
from klear_megatron.training import run


class Evaluations:
    """The evaluations of a run: none, or at the steps that its config says.

    Raises:
        UserError: problems cannot be read, encoded or graded, or the servers' context is too short.
    """

    def __init__(self, config: RLConfig, folder: ModelFolder) -> None:
        self._config = config
        self._tokenizer = folder.tokenizer
        self._benchmarks: list[Benchmark] = []
        if config.evaluation is None:
            return
        configs = config.evaluation.benchmarks
        self._benchmarks = load_benchmarks(configs, folder.tokenizer)
        for benchmark in self._benchmarks if run.is_main_rank() else ():
            for note in benchmark.loaded.notes(configs[benchmark.name], benchmark.name):
                say(note)
        sampling = config.evaluation.sampling
        check_benchmarks(
            self._benchmarks,
            folder.config,
            config.rollout,
            sampling,
            config.rewards,
            section="evaluation.sampling",
        )

    def describe(self) -> list[str]:
        """A line on each benchmark."""
        return [
            f"evaluation: {benchmark.name}: {len(benchmark.loaded.prompts)} problems x "
            f"{benchmark.samples_per_problem} samples"
            for benchmark in self._benchmarks
        ]

    def are_missing(self, step: int) -> bool:
        """Collective. Whether an evaluation is due after `step` and was cut off or never begun."""
        return objects.broadcast(self._due(step) and not self._dump_dir(step).exists())

    def _due(self, step: int) -> bool:
        config = self._config.evaluation
        return config is not None and (step % config.every == 0 or step == self._config.steps)

    def _dump_dir(self, step: int) -> Path:
        return self._config.run_dir / "evaluations" / f"step_{step:08}"

    def after(
        self, step: int, servers: PolicyServers, maker: GroupMaker | None, phases: Phases
    ) -> dict[str, float]:
        """Collective. `eval/NAME/avg` and others of each benchmark, if an evaluation is due.

        Only the main rank evaluates; the other ranks get nothing. The graded responses are written
        to `evaluations/`.

        Raises:
            UserError: servers refused a request, or were lost and did not come back.
        """
        config = self._config.evaluation
        if config is None or not self._due(step):
            return {}
        metrics: dict[str, float] = {}

        def evaluate(generator: Generator) -> None:
            if not run.is_main_rank():
                return
            assert maker is not None  # the main rank leads
            scores = evaluate_policy(
                self._benchmarks,
                generator,
                maker.rewards,
                self._tokenizer,
                config.sampling,
                self._dump_dir(step),
            )
            for name, of_one in scores.items():
                say(f"step {step}: {name}: {of_one}")
                for key, value in of_one.metrics().items():
                    metrics[f"eval/{name}/{key}"] = value

        with phases("evaluate"):
            servers.persist(evaluate)
        return metrics


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
