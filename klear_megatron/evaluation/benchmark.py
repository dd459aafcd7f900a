"""Loads a benchmark's problems, draws responses to them as rows, and grades the rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from klear_megatron.data import LoadedPrompts, load_prompts
from klear_megatron.data.files import check_paths
from klear_megatron.evaluation.config import BenchmarkConfig
from klear_megatron.evaluation.preflight import check_prompts
from klear_megatron.evaluation.responses import ungraded_row
from klear_megatron.evaluation.scores import Row
from klear_megatron.models.tokenizer import decode_response
from klear_megatron.observability import Progress
from klear_megatron.rewards import Job, RewardConfig, RewardPool
from klear_megatron.rollout import Generator, Response, RolloutConfig, SamplingConfig


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's problems, read and encoded."""

    name: str
    loaded: LoadedPrompts
    samples_per_problem: int


Asked = tuple[Benchmark, int]
"""One response is wanted to this benchmark's prompt of this position."""


def load_benchmarks(
    configs: Mapping[str, BenchmarkConfig], tokenizer: PreTrainedTokenizerBase
) -> list[Benchmark]:
    """Reads and encodes the problems of benchmarks.

    Raises:
        UserError: problems cannot be read or encoded.
    """
    for config in configs.values():
        check_paths(config.path, config.subset, config.split)
    return [
        Benchmark(name, load_prompts(config, tokenizer), config.samples_per_problem)
        for name, config in configs.items()
    ]


def check_benchmarks(
    benchmarks: Iterable[Benchmark],
    hf: PretrainedConfig,
    rollout: RolloutConfig,
    sampling: SamplingConfig,
    rewards: RewardConfig,
    section: str = "sampling",
) -> None:
    """Checks that responses to the problems can be drawn and graded.

    Args:
        section: the name of `sampling` in the config, for the message.

    Raises:
        UserError: they cannot.
    """
    for benchmark in benchmarks:
        longest = max(map(len, benchmark.loaded.token_ids))
        check_prompts(benchmark.loaded.prompts, longest, hf, rollout, sampling, rewards, section)


def draw(
    asked: Sequence[Asked],
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingConfig,
    store: Callable[[Benchmark, Row], object],
) -> None:
    """Calls `store` with the ungraded row of each response as it arrives, in any order.

    Each response is a separate request, so that none waits for the longest one of its problem.

    Raises:
        GenerationError: the servers refused a request or were lost.
    """

    def on_done(position: int, responses: list[Response]) -> None:
        benchmark, i = asked[position]
        text = decode_response(tokenizer, responses[0].token_ids)
        store(benchmark, ungraded_row(benchmark.loaded.prompts[i], text, responses[0]))

    prompts = (benchmark.loaded.token_ids[i] for benchmark, i in asked)
    generator.stream(prompts, sampling, on_done)


def grade(rows: Sequence[Row], rewards: RewardPool, *, keep_progress: bool = True) -> None:
    """Adds `reward` to the rows, and `answer` to those of mathematical problems."""
    with Progress("grade", len(rows), keep=keep_progress) as progress:
        add_rewards(rows, rewards, on_done=lambda _: progress.advance())
    for row in rows:
        row.pop("answer", None)  # of an earlier grading, by other settings
    mathematical = [row for row in rows if rewards.is_math(row["data_source"])]
    if mathematical:
        answers = rewards.read_answers([row["response"] for row in mathematical])
        for row, answer in zip(mathematical, answers, strict=True):
            row["answer"] = answer


def add_rewards(
    rows: Sequence[Row], rewards: RewardPool, on_done: Callable[[int], None] | None = None
) -> None:
    """Adds `reward` to the rows; `on_done` is passed to RewardPool.grade."""
    jobs = [
        Job(
            row["data_source"],
            row["response"],
            row["ground_truth"],
            prompt=row["prompt"],
            extra_info=row.get("extra_info", {}),
            response_length=row["tokens"],
            index=row["index"],
        )
        for row in rows
    ]
    for row, reward in zip(rows, rewards.grade(jobs, on_done), strict=True):
        row["reward"] = asdict(reward)
