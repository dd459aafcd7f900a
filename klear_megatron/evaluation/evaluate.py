"""avg@n accuracy of a model on a set of problems, through a real SGLang server."""

import json
import math
import statistics
from dataclasses import asdict, dataclass

from klear_megatron.config import write_config
from klear_megatron.data import encode_prompts, read_prompts
from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.models.hf_checkpoint import read_config
from klear_megatron.models.tokenizer import decode_response, read_stop_token_ids, read_tokenizer
from klear_megatron.observability import Progress, say
from klear_megatron.observability.responses import response_row, write_rows
from klear_megatron.rewards import RewardPool, check_data_sources
from klear_megatron.rollout import Generator, serving


@dataclass(frozen=True)
class Scores:
    """Results over all problems."""

    accuracy: float
    """avg@n: the mean over problems of the share of correct samples."""
    standard_error: float
    """Of `accuracy`, from the spread over problems; 0 with a single problem."""
    formatted: float
    """Share of samples whose reasoning is in one well-formed think block."""
    truncated: float
    """Share of samples that hit the length limit."""
    length_mean: float
    """Tokens per response."""
    problems: int
    samples_per_problem: int


def evaluate(config: EvalConfig) -> Scores:
    """Draws, grades and writes `responses.jsonl` and `results.json` into the run directory.

    Raises:
        UserError: bad data, a bad model, or a server that fails.
    """
    hf = read_config(config.model)
    tokenizer = read_tokenizer(config.model)
    prompts = read_prompts(config.data.path)
    check_data_sources(prompt.data_source for prompt in prompts)
    prompts, prompt_ids = encode_prompts(tokenizer, prompts, config.data.max_prompt_length)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, config.run_dir / "config.yaml")
    say(f"starting SGLang for {config.model}")
    with (
        RewardPool(config.rewards) as rewards,
        serving(config.rollout, config.model, config.run_dir / "logs", seed=config.seed) as urls,
    ):
        generator = Generator(
            urls,
            config.rollout,
            vocab_size=hf.vocab_size,
            stop_token_ids=read_stop_token_ids(config.model, tokenizer),
        )
        with Progress("generate", len(prompts)) as progress:
            drawn = generator.generate(
                prompt_ids,
                config.sampling,
                responses_per_prompt=config.samples_per_problem,
                on_done=lambda _: progress.advance(),
            )
        texts = [
            [decode_response(tokenizer, response.token_ids) for response in responses]
            for responses in drawn
        ]
        jobs = [
            (prompt.data_source, text, prompt.ground_truth)
            for prompt, samples in zip(prompts, texts, strict=True)
            for text in samples
        ]
        with Progress("grade", len(jobs)) as progress:
            graded = rewards.grade(jobs, on_done=lambda _: progress.advance())

    n = config.samples_per_problem
    grades = [graded[i : i + n] for i in range(0, len(graded), n)]
    write_rows(
        config.run_dir / "responses.jsonl",
        (
            response_row(prompt, text, response, reward)
            for prompt, samples, responses, rewarded in zip(
                prompts, texts, drawn, grades, strict=True
            )
            for text, response, reward in zip(samples, responses, rewarded, strict=True)
        ),
    )
    shares = [statistics.mean(reward.correct for reward in problem) for problem in grades]
    responses = [response for samples in drawn for response in samples]
    scores = Scores(
        accuracy=statistics.mean(shares),
        standard_error=(
            statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
        ),
        formatted=statistics.mean(reward.formatted for reward in graded),
        truncated=statistics.mean(response.truncated for response in responses),
        length_mean=statistics.mean(len(response.token_ids) for response in responses),
        problems=len(prompts),
        samples_per_problem=n,
    )
    (config.run_dir / "results.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")
    return scores
