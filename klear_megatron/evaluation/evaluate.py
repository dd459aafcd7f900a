"""Measures a model's accuracy on benchmarks through real SGLang servers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from klear_megatron.checkpoints.hub import local_model
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.config import as_yaml, write_config
from klear_megatron.errors import UserError
from klear_megatron.evaluation.benchmark import (
    Asked,
    Benchmark,
    check_benchmarks,
    draw,
    grade,
    load_benchmarks,
)
from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.evaluation.preflight import check_rewards
from klear_megatron.evaluation.scores import Row, Scores, score
from klear_megatron.evaluation.stored import (
    append_row,
    check_problems,
    claim,
    config_path,
    folder_of,
    read_all,
    read_drawn,
    read_graded,
    settings_of,
    stored_config,
    write_problems,
)
from klear_megatron.evaluation.usage import DrawingUsage
from klear_megatron.evaluation.yarn import extend_context
from klear_megatron.models.tokenizer import read_template
from klear_megatron.observability import Progress, say
from klear_megatron.rewards import RewardPool
from klear_megatron.rollout.generation import generating


def evaluate(config: EvalConfig) -> dict[str, Scores]:
    """Draws the responses missing from the run directory, then grades all of them.

    Each response is stored as it arrives, so an interrupted evaluation continues when it is run
    again. The scores are written to `results.json`.

    Returns:
        The scores of each benchmark.

    Raises:
        UserError: the data or the model is bad, a server fails, or the run directory holds
            responses drawn with other settings.
    """
    config, model = _with_model_here(config)
    check_rewards(model.tokenizer, config.rewards)
    benchmarks = load_benchmarks(config.benchmarks, model.tokenizer)
    asked: list[Asked] = []
    stored = 0
    for benchmark in benchmarks:
        for note in benchmark.loaded.notes(config.benchmarks[benchmark.name], benchmark.name):
            say(note)
        folder = folder_of(config.run_dir, benchmark.name)
        claim(folder, settings_of(config, benchmark))
        drawn = read_drawn(config.run_dir, benchmark.name)
        prompts = benchmark.loaded.prompts
        check_problems(folder, drawn, prompts)
        write_problems(config.run_dir, benchmark.name, drawn)  # drops a half-written last line
        stored += sum(len(rows) for rows in drawn.values())
        for i, prompt in enumerate(prompts):
            missing = benchmark.samples_per_problem - len(drawn.get(prompt.index, []))
            asked += [(benchmark, i)] * missing
    write_config(config, config_path(config.run_dir))
    if asked:
        _draw(config, model, benchmarks, asked, stored)
    return _grade(config)


def _with_model_here(config: EvalConfig) -> tuple[EvalConfig, ModelFolder]:
    """The config with the model's folder and the chat template's text, and that folder."""
    template = config.chat_template
    if template is not None:
        template = read_template(template, "chat_template")
    model = ModelFolder(local_model(config.model), template)
    return config.model_copy(update={"model": model.path, "chat_template": template}), model


def describe(config: EvalConfig) -> Iterator[str]:
    """Lines on what `evaluate` would do: all settings, and the problems and responses.

    Raises:
        UserError: what `evaluate` would refuse before its servers start.
    """
    config, model = _with_model_here(config)
    yield as_yaml(config)
    check_rewards(model.tokenizer, config.rewards)
    benchmarks = load_benchmarks(config.benchmarks, model.tokenizer)
    rollout = config.rollout.model_copy(update={"urls": ()})  # servers are not asked now
    if config.yarn is not None:
        rollout = extend_context(rollout, model.config, config.yarn)
    check_benchmarks(benchmarks, model.config, rollout, config.sampling, config.rewards)
    for benchmark in benchmarks:
        yield from benchmark.loaded.notes(config.benchmarks[benchmark.name], benchmark.name)
        problems, samples = len(benchmark.loaded.prompts), benchmark.samples_per_problem
        stored = sum(map(len, read_drawn(config.run_dir, benchmark.name).values()))
        yield (
            f"{benchmark.name}: {problems} problems x {samples} samples = {problems * samples} "
            f"responses, of which {stored} are stored already"
        )
    yield config.rollout.describe_servers()


def _draw(
    config: EvalConfig,
    model: ModelFolder,
    benchmarks: Sequence[Benchmark],
    asked: Sequence[Asked],
    stored: int,
) -> None:
    """Draws the missing responses and appends them to the stored ones."""
    rollout = config.rollout
    if config.yarn is not None:
        rollout = extend_context(rollout, model.config, config.yarn)
    check_benchmarks(benchmarks, model.config, rollout, config.sampling, config.rewards)
    if stored:
        say(f"going on: {stored} of {stored + len(asked)} responses are in {config.run_dir}")
    logs = config.run_dir / "logs"
    with (
        generating(model, rollout, logs, seed=config.seed, drawn_before=stored) as generator,
        DrawingUsage(config.run_dir, benchmarks, generator.urls) as used,
        Progress("generate", stored + len(asked), start=stored) as progress,
    ):

        def store(benchmark: Benchmark, row: Row) -> None:
            append_row(folder_of(config.run_dir, benchmark.name), row)
            used.add(benchmark, row)
            progress.advance()

        draw(asked, generator, model.tokenizer, config.sampling, store)


def regrade(run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, Scores]:
    """Grades the responses of a finished evaluation again, without a server.

    Args:
        overrides: changes to the evaluation's config, as `load_config` takes them; only those of
            `rewards` are allowed.

    Raises:
        UserError: responses are missing or cannot be graded here, an override changes something
            other than `rewards`, or `run_dir` holds no evaluation.
    """
    stored, config = stored_config(run_dir), stored_config(run_dir, overrides)
    if config.model_copy(update={"rewards": stored.rewards}) != stored:
        raise UserError(
            f"{' '.join(overrides)}: regrading can change only --rewards.*; to change anything "
            "else, run `klear-megatron eval` again"
        )
    write_config(config, config_path(run_dir))
    return _grade(config)


def _grade(config: EvalConfig) -> dict[str, Scores]:
    """Grades all stored responses, then writes them back along with their scores."""
    stored = {name: read_all(config.run_dir, name) for name in config.benchmarks}
    rows = [row for problems in stored.values() for of_one in problems.values() for row in of_one]
    with RewardPool(config.rewards) as rewards:
        grade(rows, rewards)
    for name, problems in stored.items():
        write_problems(config.run_dir, name, problems)
    scores = {name: score(problems) for name, problems in stored.items()}
    results = {name: asdict(of_one) for name, of_one in scores.items()}
    (config.run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return scores


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    config: EvalConfig
    scores: dict[str, Scores]
    """By the benchmarks' names."""


def read_evaluation(run_dir: Path) -> Evaluation:
    """The config and the scores of a finished evaluation.

    Raises:
        UserError: `run_dir` holds no evaluation, or one that is not finished.
    """
    config = stored_config(run_dir)
    scores = {name: score(read_graded(run_dir, name)) for name in config.benchmarks}
    return Evaluation(config, scores)
