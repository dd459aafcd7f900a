"""What a step does with its rollouts once it has them: scores them, then trains on them."""

from dataclasses import replace

import torch
import torch.distributed as dist

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import PolicyObjective
from klear_megatron.observability import Phases
from klear_megatron.platform.device import this_device
from klear_megatron.policy.learner import Learner
from klear_megatron.rl.batches import mini_batches
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.metrics import log_prob_metrics, train_metrics
from klear_megatron.rl.reference import make_reference
from klear_megatron.rl.rollouts import Rollouts
from klear_megatron.training.steps_taken import StepsTaken


class Updates:
    """The policy in training, its loss and its reference. Every method is collective.

    Raises:
        UserError: a loss or a model that cannot be used.
    """

    def __init__(self, config: RLConfig, folder: ModelFolder) -> None:
        self._config = config
        self._objective = PolicyObjective(config.loss)
        self._steps_taken = StepsTaken(config.run_dir)
        self.learner = Learner(
            config.policy,
            folder,
            total_steps=config.optimizer_steps,
            temperature=config.sampling.temperature,
            seed=config.seed,
        )
        self._reference = make_reference(config, folder)

    def score(self, rollouts: Rollouts, phases: Phases) -> Rollouts:
        """The same rollouts with what the loss compares with: `old_log_probs`, and what it asks for
        beside them; and with metrics of these."""
        if not rollouts.groups:
            return rollouts
        batch, loss = rollouts.batch, self._config.loss
        if self._config.old_log_probs == "server":
            old_log_probs = batch.fields["rollout_log_probs"].nan_to_num(0, 0, 0)  # not trained
        else:
            with phases("log_probs"):
                old_log_probs, old_entropy = self.learner.model.log_probs(batch)
            if loss.uses_old_entropy:
                batch = batch.with_fields(old_entropy=old_entropy)
        batch = batch.with_fields(old_log_probs=old_log_probs)
        metrics = rollouts.metrics | log_prob_metrics(batch, loss)
        if self._reference is not None:
            with phases("reference"):
                batch, distance = self._reference.compare(batch)
            metrics |= distance
        return replace(rollouts, batch=batch, metrics=metrics)

    def train(self, rollouts: Rollouts, step: int) -> Rollouts:
        """Takes the optimizer steps on one step's scored rollouts, if there are any groups.

        Returns:
            the same with metrics of the steps, and with the field `clipped` of `Result`, for dumps.

        Raises:
            UserError: several mini-batches in a row had gradients that are not finite.
        """
        if not rollouts.groups:
            return rollouts
        batch, trained = rollouts.batch, []
        clipped = torch.zeros(len(batch.tokens), dtype=torch.int8)
        for chosen in mini_batches(self._config, rollouts.groups, step):
            mini_batch = batch.select(chosen)
            mine = torch.zeros(len(mini_batch.tokens), dtype=torch.int8, device=this_device())
            trained.append(self.learner.train_step(mini_batch, self._objective, mine))
            self._steps_taken(step, mini_batch, trained[-1])
            if self._config.token_dumps:
                dist.all_reduce(mine, dist.ReduceOp.MAX)
                clipped[batch.token_places(chosen)] = mine.cpu()
        batch = batch.with_fields(clipped=clipped.float())
        return replace(rollouts, batch=batch, metrics=rollouts.metrics | train_metrics(trained))
