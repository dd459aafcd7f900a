"""Reinforcement learning with verifiable rewards: generate, grade, train, sync, repeat."""

import contextlib
import socket
from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.data import LoadedPrompts, PromptSampler, load_prompts
from klear_megatron.losses import PolicyObjective
from klear_megatron.observability import Phases, Progress, Recorder, say
from klear_megatron.platform import objects
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.learner import Learner
from klear_megatron.policy.model import Model
from klear_megatron.policy.parallel import leader_rank
from klear_megatron.rewards import RewardConfig, RewardPool, check_data_sources, check_ground_truths
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.evaluation import Evaluations
from klear_megatron.rl.groups import RolloutWorker
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rollout.external_servers import check_lengths
from klear_megatron.training import run


def train_rl(config: RLConfig) -> None:
    """Runs to the end, from the beginning or from the run's newest checkpoint.

    Raises:
        UserError: bad data, a bad model, a config that does not fit them, or a server that fails.
    """
    folder = run.start(config)
    tokenizer = folder.tokenizer
    prompts = read_training_prompts(config, tokenizer)
    evaluations = Evaluations(config, tokenizer)
    objective = PolicyObjective(config.loss)
    learner = Learner(
        config.policy,
        folder,
        total_steps=config.optimizer_steps,
        temperature=config.sampling.temperature,
        seed=config.seed,
    )
    sampler = make_sampler(config, prompts)
    first = 1
    if state := run.resume(learner, config.run_dir):
        sampler.load_state_dict(state["sampler"])
        first = state["step"] + 1

    with contextlib.ExitStack() as stack:
        leader, leaders = leader_rank()
        leads = leader is not None
        servers = PolicyServers(learner.model, config, tokenizer, stack, leads=leads)
        pool = make_reward_pool(config.rewards, leads=leads)
        rewards = stack.enter_context(pool) if pool is not None else None
        worker = RolloutWorker(
            config, tokenizer, prompts, sampler, servers, rewards, leader=leader, leaders=leaders
        )
        main = run.is_main_rank()
        next_step = first if state else 0
        recorder = (
            stack.enter_context(Recorder(config.run_dir, next_step=next_step)) if main else None
        )
        progress = stack.enter_context(Progress("RL", config.steps, start=first - 1, enabled=main))
        servers.sync(version=first - 1)
        phases = Phases()
        if state is None:
            metrics = evaluations.after(0, worker, phases)
            if recorder is not None and metrics:
                recorder.write(0, metrics)
        for step in range(first, config.steps + 1):
            rollouts = worker.collect(step, phases)
            metrics = rollouts.metrics
            if rollouts.groups:
                with phases("log_probs"):
                    batch, differences = with_old_log_probs(learner.model, rollouts.batch)
                with phases("train"):
                    trained = [
                        learner.train_step(mini_batch, objective)
                        for mini_batch in mini_batches(config, batch, rollouts.groups, step)
                    ]
                metrics |= differences | summarize(trained)
            with phases("sync"):
                servers.sync(version=step)
            metrics |= evaluations.after(step, worker, phases)
            metrics |= throughput(metrics, phases.take(), rollouts.batch)
            if recorder is not None:
                recorder.write(step, metrics)
            progress.advance(
                note=f"reward {metrics['reward/mean']:.3f} accuracy "
                f"{metrics['reward/accuracy']:.3f} length {metrics['response/length_mean']:.0f}"
            )
            run.save(learner, config, step, config.steps, {"sampler": sampler.state_dict()})


def make_reward_pool(config: RewardConfig, *, leads: bool) -> RewardPool | None:
    """Collective. A leader's share of the processes that grade on its host; None for others."""
    host = socket.gethostname()
    leaders_here = objects.all_gather(host if leads else None).count(host)
    return RewardPool(config, sharers=leaders_here) if leads else None


def read_training_prompts(config: RLConfig, tokenizer: PreTrainedTokenizerBase) -> LoadedPrompts:
    """The prompts to train on; says how many rows were left out or cut.

    Raises:
        UserError: a malformed row, a row that cannot be graded, prompts all too long, or servers
            whose context is too short for prompt and response.
    """
    loaded = load_prompts(config.data, tokenizer)
    hf = read_config(config.policy.path)
    check_lengths(config.rollout, hf, max(map(len, loaded.token_ids)), config.sampling)
    check_data_sources((prompt.data_source for prompt in loaded.prompts), config.rewards)
    check_ground_truths((prompt.data_source, prompt.ground_truth) for prompt in loaded.prompts)
    for note in loaded.notes(config.data, "data") if run.is_main_rank() else ():
        say(note)
    return loaded


def make_sampler(config: RLConfig, loaded: LoadedPrompts) -> PromptSampler:
    """The order of the prompts, by the config's stages."""
    return PromptSampler(
        len(loaded.prompts),
        config.seed,
        [prompt.data_source for prompt in loaded.prompts],
        config.data.stages,
    )


def with_old_log_probs(model: Model, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """Adds the trainer's own log-probabilities before the first update, as `old_log_probs`, and
    tells how far the servers' are from them."""
    log_probs, _ = model.log_probs(batch)
    trained = batch.fields["loss_mask"] > 0
    metrics = {}
    if trained.any():
        difference = (log_probs - batch.fields["rollout_log_probs"])[trained].abs()
        metrics = {
            "rollout/log_prob_difference_mean": difference.mean().item(),
            "rollout/log_prob_difference_max": difference.max().item(),
        }
    return batch.with_fields(old_log_probs=log_probs), metrics


def mini_batches(config: RLConfig, batch: Batch, groups: int, step: int) -> Iterator[Batch]:
    """The step's groups in random order, `prompts_per_mini_batch` at a time."""
    size = config.responses_per_prompt
    order = np.random.default_rng([config.seed, step]).permutation(groups)
    for start in range(0, groups, config.prompts_per_mini_batch):
        chosen = order[start : start + config.prompts_per_mini_batch]
        yield batch.select([int(group) * size + i for group in chosen for i in range(size)])


def summarize(mini_batches: list[dict[str, float]]) -> dict[str, float]:
    """Means over the mini-batches; of the extremes, the most extreme."""
    metrics = {}
    for name in mini_batches[0]:
        values = [mini_batch[name] for mini_batch in mini_batches]
        if name.endswith("_min"):
            metrics[f"train/{name}"] = min(values)
        elif name.endswith("_max"):
            metrics[f"train/{name}"] = max(values)
        else:
            metrics[f"train/{name}"] = sum(values) / len(values)
    return metrics


def throughput(
    metrics: dict[str, float], seconds: dict[str, float], batch: Batch
) -> dict[str, float]:
    """The seconds, and tokens per second of generation, of training, and of the whole step but its
    evaluation."""
    generated = metrics["rollout/tokens"]
    training = seconds["seconds/total"] - seconds.get("seconds/evaluate", 0.0)
    rates = {"throughput/tokens_per_second": generated / training}
    if "seconds/generate" in seconds:
        rates["throughput/generated_per_second"] = generated / seconds["seconds/generate"]
    if "seconds/train" in seconds:
        rates["throughput/trained_per_second"] = len(batch.tokens) / seconds["seconds/train"]
    return seconds | rates
