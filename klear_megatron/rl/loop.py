"""Reinforcement learning with verifiable rewards: generate, grade, train, sync, repeat."""

import contextlib
import socket

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data import LoadedPrompts, PromptSampler, load_prompts, note_on_repeats
from klear_megatron.evaluation.preflight import check_prompts
from klear_megatron.observability import Phases, Progress, RolloutFiles, say
from klear_megatron.platform import objects
from klear_megatron.policy.checkpoint import checkpoint_path
from klear_megatron.policy.parallel import leader_rank
from klear_megatron.rewards import RewardConfig, RewardPool
from klear_megatron.rl.ahead import AheadCollector
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.dropped import DroppedSteps
from klear_megatron.rl.evaluation import Evaluations
from klear_megatron.rl.groups import GroupMaker
from klear_megatron.rl.metrics import idle_times
from klear_megatron.rl.preflight import check_before_reading, check_servers
from klear_megatron.rl.rollouts import Collector, Rollouts
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rl.updates import Updates
from klear_megatron.rollout import Share
from klear_megatron.training import run
from klear_megatron.training.closing import what_next
from klear_megatron.training.metrics import run_metrics, training_speed
from klear_megatron.training.planned import PlannedSteps
from klear_megatron.training.resume import find_checkpoint, record_config, resume
from klear_megatron.training.saver import Saver, is_finished
from klear_megatron.training.trackers import make_recorder
from klear_megatron.training.usage import record_start


def train_rl(config: RLConfig) -> None:
    """Runs to the end, from the beginning or from the run's newest checkpoint.

    Raises:
        UserError: bad data, a bad model, a config that does not fit them, or a server that fails.
        Stopped: the run was told to stop, and has been saved.
    """
    config = run.with_model_here(config)
    with run.running(config) as folder:
        if not objects.broadcast(run.is_main_rank() and is_finished(config, config.steps)):
            _train(config, folder)


def _train(config: RLConfig, folder: ModelFolder) -> None:
    check_before_reading(config, folder)
    check_servers(config)
    checkpoint = find_checkpoint(config)
    if checkpoint is not None:
        checkpoint.check_last_step(config.steps)
    planned = PlannedSteps(config)
    prompts = read_training_prompts(config, folder)
    sampler = make_sampler(config, prompts)
    if checkpoint is not None:
        sampler.load_state_dict(checkpoint.state["sampler"])
    evaluations = Evaluations(config, folder)
    updates = Updates(config, folder)
    first, state = 1, None
    if checkpoint is not None:
        state = resume(updates.learner, config, checkpoint)
        first = state["step"] + 1

    with contextlib.ExitStack() as stack:
        leads, main = leader_rank()[0] is not None, run.is_main_rank()
        servers = PolicyServers(updates.learner.model, config, folder, stack, leads=leads)
        maker = make_group_maker(config, folder, stack)
        collector = make_collector(config, prompts, sampler, servers, maker, stack, first - 1)
        if state is not None:
            collector.load(state, checkpoint_path(config.run_dir, state["step"]))
        recorder = make_recorder(config, first if state else 0, stack)
        saving = collector.state_dict, collector.save
        saver = stack.enter_context(
            Saver(updates.learner, config, config.steps, first - 1, *saving)
        )
        progress = stack.enter_context(Progress("RL", config.steps, start=first - 1, enabled=main))
        servers.sync(version=first - 1)
        begin(config, first, servers)
        phases, dropped = Phases(), DroppedSteps(config.run_dir, main=main)
        if state is None or evaluations.are_missing(first - 1):
            metrics = evaluations.after(first - 1, servers, maker, phases)
            if recorder is not None and metrics:
                recorder.write(first - 1, metrics)
        for step in range(first, config.steps + 1):
            with saver.between_steps():
                rollouts = collector.collect(step, phases)
            rollouts = updates.score(rollouts, phases)
            dropped.observe(step, rollouts)
            rollouts = train(updates, collector, rollouts, step, phases)
            metrics = rollouts.metrics | run_metrics(updates.learner, sampler)
            try:
                # Before the servers are asked for anything: they are told to end, too.
                saver.trained(step)
                with saver.between_steps():
                    with phases("sync"):
                        servers.sync(version=step)
                    metrics |= evaluations.after(step, servers, maker, phases)
            finally:
                metrics |= times(config, step, rollouts, phases, planned, metrics)
                if recorder is not None:
                    recorder.write(step, metrics)
            progress.advance(note=summary(metrics))
            saver.save_what_is_due(phases, recorder)
    if main:
        say(what_next(config.run_dir))


def train(
    updates: Updates, collector: Collector, rollouts: Rollouts, step: int, phases: Phases
) -> Rollouts:
    """Collective. What `Updates.train` returns. The tokens are kept, also if training fails."""
    trained = rollouts
    try:
        with phases("train"):
            trained = updates.train(rollouts, step)
    finally:
        with phases("share"):
            collector.dump_tokens(step, trained)
    return trained


def begin(config: RLConfig, first: int, servers: PolicyServers) -> None:
    """Collective. Writes down what goes on from here, in place of what a run that was ended had
    written of these steps; before any leader writes the first one."""
    record_config(config, first)
    record_start(config.run_dir, first, servers.devices)
    files = RolloutFiles(config.run_dir)
    objects.together(lambda: files.forget(from_step=first) if run.is_main_rank() else None)


def times(
    config: RLConfig,
    step: int,
    rollouts: Rollouts,
    phases: Phases,
    planned: PlannedSteps,
    measured: dict[str, float],
) -> dict[str, float]:
    """What the step's seconds went into, and how fast it was; says what was planned for it."""
    seconds = phases.take()
    metrics = seconds | idle_times(rollouts.metrics, seconds)
    metrics["flops/generate"] = planned.flops(rollouts.drawn, passes=1)
    if rollouts.groups:
        lengths = rollouts.batch.lengths
        forwards = (config.old_log_probs == "trainer") + (config.loss.kl is not None)
        metrics["flops/log_probs"] = planned.flops(lengths, passes=forwards)
        metrics |= training_speed(planned, lengths, seconds)
        at_a_time = config.prompts_per_mini_batch * config.responses_per_prompt
        planned.observe(
            step, lengths, at_a_time, seconds["seconds/train"], measured["memory/peak_gib"]
        )
    return metrics


def make_collector(
    config: RLConfig,
    prompts: LoadedPrompts,
    sampler: PromptSampler,
    servers: PolicyServers,
    maker: GroupMaker | None,
    stack: contextlib.ExitStack,
    version: int,
) -> Collector:
    """Collective. Draws step by step, or ahead of training; see `Collector`, `AheadCollector`."""
    if config.max_staleness:
        return AheadCollector(config, prompts, sampler, servers, maker, stack, version)
    return Collector(config, prompts, sampler, servers, maker)


def make_group_maker(
    config: RLConfig, folder: ModelFolder, stack: contextlib.ExitStack
) -> GroupMaker | None:
    """Collective. The maker of groups on a rank that leads; None on others. `stack` ends it."""
    leader, leaders = leader_rank()
    pool = make_reward_pool(config.rewards, leads=leader is not None)
    if leader is None or pool is None:
        return None
    rewards = stack.enter_context(pool)
    share = Share(leader, leaders)
    return stack.enter_context(GroupMaker(config, folder.tokenizer, rewards, share))


def summary(metrics: dict[str, float]) -> str:
    """What the progress of training shows beside the step."""
    shown = (
        f"reward {metrics['reward/mean']:.3f} accuracy {metrics['reward/accuracy']:.3f} "
        f"length {metrics['response/length_mean']:.0f} "
        f"dropped {metrics['groups/dropped']:.0f}/{metrics['groups/drawn']:.0f}"
    )
    if "train/grad_norm" in metrics:
        shown += (
            f" entropy {metrics['train/entropy']:.3f} gradient {metrics['train/grad_norm']:.2f} "
            f"(max {metrics['train/grad_norm_max']:.2f})"
        )
    return shown


def make_reward_pool(config: RewardConfig, *, leads: bool) -> RewardPool | None:
    """Collective. A leader's share of the processes that grade on its host; None for others."""
    host = socket.gethostname()
    leaders_here = objects.all_gather(host if leads else None).count(host)
    return RewardPool(config, sharers=leaders_here) if leads else None


def read_training_prompts(config: RLConfig, folder: ModelFolder) -> LoadedPrompts:
    """The prompts to train on; says how many rows were left out or cut.

    Raises:
        UserError: a malformed row, a row that cannot be graded, prompts all too long, or servers
            whose context is too short for prompt and response.
    """
    loaded = load_prompts(config.data, folder.tokenizer)
    check_prompts(
        loaded.prompts,
        max(map(len, loaded.token_ids)),
        folder.config,
        config.rollout,
        config.sampling,
        config.rewards,
    )
    notes = loaded.notes(config.data, "data")
    notes += note_on_repeats(len(loaded.prompts), config.prompts_per_step, "prompts_per_step")
    for note in notes if run.is_main_rank() else ():
        say(note)
    return loaded


def make_sampler(config: RLConfig, loaded: LoadedPrompts) -> PromptSampler:
    """The order of the prompts, by the config's stages."""
    return PromptSampler(
        len(loaded.prompts),
        config.seed,
        [prompt.data_source for prompt in loaded.prompts],
        config.data.stages,
        loaded.fingerprint(),
    )
