"""Supervised fine-tuning on conversations."""

import contextlib

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data import PromptSampler
from klear_megatron.losses import SFTObjective
from klear_megatron.observability import Phases, Progress, say
from klear_megatron.platform import objects
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.learner import Learner
from klear_megatron.sft.config import SFTConfig
from klear_megatron.sft.data import check_before_reading, count_steps, read_examples
from klear_megatron.sft.validation import Validation
from klear_megatron.training import run
from klear_megatron.training.closing import what_next
from klear_megatron.training.metrics import run_metrics, training_speed
from klear_megatron.training.planned import PlannedSteps
from klear_megatron.training.resume import find_checkpoint, record_config, resume
from klear_megatron.training.saver import Saver, is_finished
from klear_megatron.training.steps_taken import StepsTaken
from klear_megatron.training.trackers import make_recorder
from klear_megatron.training.usage import record_start


def train_sft(config: SFTConfig) -> None:
    """Trains to the end, from the start or from the run's newest checkpoint.

    Raises:
        UserError: bad data, a bad model, or a config that does not fit them.
        Stopped: the run was told to stop, and has been saved.
    """
    config = run.with_model_here(config)
    with run.running(config) as folder:
        _train(config, folder)


def _train(config: SFTConfig, folder: ModelFolder) -> None:
    check_before_reading(config, folder)
    checkpoint = find_checkpoint(config)
    planned = PlannedSteps(config)
    examples = read_examples(config, folder)
    steps = count_steps(config, len(examples))
    if checkpoint is not None:
        checkpoint.check_last_step(steps)
    validation = Validation(config, folder, steps)
    if objects.broadcast(run.is_main_rank() and is_finished(config, steps)):
        return
    sampler = PromptSampler(len(examples), config.seed, fingerprint=examples.fingerprint())
    if checkpoint is not None:
        sampler.load_state_dict(checkpoint.state["sampler"])
    learner = Learner(config.policy, folder, total_steps=steps, seed=config.seed)
    objective, phases = SFTObjective(), Phases()
    steps_taken = StepsTaken(config.run_dir)
    first, state = 1, None
    if checkpoint is not None:
        state = resume(learner, config, checkpoint)
        first = state["step"] + 1
    record_config(config, first)
    record_start(config.run_dir, first)

    with contextlib.ExitStack() as stack:
        recorder = make_recorder(config, first if state else 0, stack)
        saver = stack.enter_context(
            Saver(learner, config, steps, first - 1, lambda: {"sampler": sampler.state_dict()})
        )
        progress = stack.enter_context(
            Progress("SFT", steps, start=first - 1, enabled=run.is_main_rank())
        )
        if state is None:
            metrics = validation.after(0, learner.model, phases)
            if recorder is not None and metrics:
                recorder.write(0, metrics | phases.take())
        for step in range(first, steps + 1):
            tokens, masks = zip(
                *(examples[row] for row in sampler.next_batch(config.batch_size)), strict=True
            )
            batch = Batch.from_sequences(tokens, loss_mask=masks)
            with phases("train"):
                trained = learner.train_step(batch, objective)
            taken = steps_taken(step, batch, trained)
            metrics = {f"train/{name}": value for name, value in trained.items()}
            metrics |= validation.after(step, learner.model, phases)
            seconds = phases.take()
            metrics |= seconds
            metrics |= training_speed(planned, batch.lengths, seconds)
            metrics |= run_metrics(learner, sampler) | {"train/skipped": float(not taken)}
            planned.observe(
                step,
                batch.lengths,
                config.batch_size,
                seconds["seconds/train"],
                metrics["memory/peak_gib"],
            )
            if recorder is not None:
                recorder.write(step, metrics)
            progress.advance(
                note=f"loss {trained['loss']:.3f} gradient {trained['grad_norm']:.2f} "
                f"lr {trained['lr']:.2g}"
            )
            saver.trained(step)
            saver.save_what_is_due(phases, recorder)
    if recorder is not None:
        say(what_next(config.run_dir))
