"""Accuracy of a model on a set of problems, through a real SGLang server."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from klear_megatron.config import load_config, write_config
from klear_megatron.data import LoadedPrompts, load_prompts
from klear_megatron.errors import UserError
from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.evaluation.scores import Scores, is_math, score
from klear_megatron.evaluation.stored import (
    Problems,
    append_rows,
    check_problems,
    claim,
    read_all,
    read_drawn,
    write_problems,
)
from klear_megatron.evaluation.yarn import extend_context
from klear_megatron.models.hf_checkpoint import read_config
from klear_megatron.models.tokenizer import decode_response, read_stop_token_ids, read_tokenizer
from klear_megatron.observability import Progress, say
from klear_megatron.observability.responses import response_row
from klear_megatron.rewards import RewardPool, check_data_sources, check_ground_truths
from klear_megatron.rewards.answers import math_answers
from klear_megatron.rollout import Generator, Response, serving

_CONFIG = "config.yaml"


def evaluate(config: EvalConfig) -> Scores:
    """Draws what is missing in the run directory, then grades it all.

    `responses.jsonl` gets each problem's samples as they finish, so that an evaluation that was
    ended can be run again and goes on. `results.json` gets the scores.

    Raises:
        UserError: bad data, a bad model, a server that fails, or a run directory with responses
            that were drawn with other settings.
    """
    tokenizer = read_tokenizer(config.model)
    loaded = _load(config, tokenizer)
    claim(config, len(loaded.prompts))
    write_config(config, config.run_dir / _CONFIG)
    drawn = read_drawn(config.run_dir)
    check_problems(drawn, loaded.prompts, config.run_dir)
    missing = [i for i, prompt in enumerate(loaded.prompts) if prompt.index not in drawn]
    if missing:
        if drawn:
            say(f"going on: {len(drawn)} of {len(loaded.prompts)} problems are in {config.run_dir}")
        write_problems(config.run_dir, drawn)  # without what was half-written
        _draw(config, tokenizer, loaded, missing)
    return _grade(config)


def _load(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedPrompts:
    loaded = load_prompts(config.data, tokenizer)
    check_data_sources((prompt.data_source for prompt in loaded.prompts), config.rewards)
    check_ground_truths((prompt.data_source, prompt.ground_truth) for prompt in loaded.prompts)
    for note in loaded.notes(config.data):
        say(note)
    return loaded


def _draw(
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedPrompts,
    missing: list[int],
) -> None:
    """Appends the samples of the missing prompts to the stored ones."""
    hf = read_config(config.model)
    stop_token_ids = read_stop_token_ids(config.model, tokenizer)
    rollout = config.rollout
    if config.yarn_factor is not None:
        rollout = extend_context(rollout, hf, config.yarn_factor)
    say(f"starting SGLang for {config.model}")
    with (
        serving(rollout, config.model, config.run_dir / "logs", seed=config.seed) as urls,
        Progress("generate", len(loaded.prompts), start=len(loaded.prompts) - len(missing)) as bar,
    ):

        def store(i: int, responses: list[Response]) -> None:
            prompt = loaded.prompts[missing[i]]
            append_rows(
                config.run_dir,
                [
                    response_row(
                        prompt, decode_response(tokenizer, response.token_ids), response, None
                    )
                    for response in responses
                ],
            )
            bar.advance()

        generator = Generator(
            urls, rollout, vocab_size=hf.vocab_size, stop_token_ids=stop_token_ids
        )
        generator.generate(
            [loaded.token_ids[i] for i in missing],
            config.sampling,
            responses_per_prompt=config.samples_per_problem,
            on_done=store,
        )


def regrade(run_dir: Path, overrides: Sequence[str] = ()) -> Scores:
    """Grades the responses of a finished evaluation anew, without a server.

    Args:
        overrides: of the evaluation's config, as `load_config` takes them; of `rewards` only.

    Raises:
        UserError: responses are missing or cannot be graded here, or `run_dir` is no evaluation's.
    """
    read_all(run_dir)  # says what is wrong with a folder that is something else
    stored = load_config(EvalConfig, run_dir / _CONFIG)
    config = load_config(EvalConfig, run_dir / _CONFIG, overrides)
    if config.model_copy(update={"rewards": stored.rewards}) != stored:
        raise UserError(
            f"{' '.join(overrides)}: responses that are there can be graded by other --rewards.*; "
            "all else takes another `klear-megatron eval`"
        )
    config = config.model_copy(update={"run_dir": run_dir})
    write_config(config, run_dir / _CONFIG)
    return _grade(config)


def _grade(config: EvalConfig) -> Scores:
    """Grades all stored responses, and writes them back and their scores."""
    problems = read_all(config.run_dir)
    _grade_rows(problems, config)
    scores = score(problems)
    write_problems(config.run_dir, problems)
    (config.run_dir / "results.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")
    return scores


def _grade_rows(problems: Problems, config: EvalConfig) -> None:
    """Puts `reward`, and `answer` where it is mathematical, into the rows."""
    rows = [row for samples in problems.values() for row in samples]
    jobs = [(row["data_source"], row["response"], row["ground_truth"]) for row in rows]
    with (
        RewardPool(config.rewards) as rewards,
        Progress("grade", len(jobs)) as progress,
    ):
        for row, reward in zip(
            rows, rewards.grade(jobs, on_done=lambda _: progress.advance()), strict=True
        ):
            row["reward"] = asdict(reward)
    mathematical = [row for row in rows if is_math(row)]
    if mathematical:
        answers = math_answers([row["response"] for row in mathematical], config.rewards)
        for row, answer in zip(mathematical, answers, strict=True):
            row["answer"] = answer
