"""A model and what trains it: Megatron's optimizer, schedule and checkpoints."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import Objective, Result, Sequences
from klear_megatron.losses.inputs import Fields
from klear_megatron.observability import Metric
from klear_megatron.platform import objects
from klear_megatron.platform.device import this_device
from klear_megatron.policy import checkpoint
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.build import build_optimizer, is_logging_rank, wrap_data_parallel
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.context_parallel import sum_over_context_parallel_ranks
from klear_megatron.policy.kernels import Installed, choose_offload, warn
from klear_megatron.policy.micro_batches import MicroBatch
from klear_megatron.policy.model import Model

METRICS = (
    Metric(
        "grad_norm",
        "norm",
        "of the gradient of all parameters, before clipping; mean over the step's optimizer steps",
        "rises over many steps, or is far above `clip_grad` for long",
    ),
    Metric("lr", "", "learning rate; mean over the step's optimizer steps"),
    Metric(
        "load_balancing_loss",
        "",
        "with `moe_aux_loss_coeff`: of the router, mean over layers; 1 in perfect balance",
        "rises: a few experts get most tokens",
    ),
)
"""Of `Learner.train_step`, beside the objective's."""


class Learner:
    """Trains `model`, which starts from the weights at `config.path`.

    Every method is collective: all ranks call it, with the same arguments.

    Args:
        folder: of `config.hf_folder`.
        total_steps: optimizer steps of the learning-rate schedule.
        temperature, seed: passed to `Model`.

    Raises:
        UserError: an unknown or unfitting model, or weights that do not match their config.
    """

    def __init__(
        self,
        config: PolicyConfig,
        folder: ModelFolder,
        *,
        total_steps: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.model = Model(config, folder, temperature=temperature, seed=seed)
        self.model.load(config.path)
        kernels = self.model.kernels
        self.model.modules = wrap_data_parallel(self.model.modules, config.parallel, kernels)
        offload, warnings = choose_offload(config.optimizer, Installed.here())
        warn(warnings)
        self._optimizer, self._scheduler = build_optimizer(
            config.optimizer,
            self.model.modules,
            kernels,
            offload=offload,
            total_steps=total_steps,
        )
        self._writer = checkpoint.CheckpointWriter(config.checkpoint, folder)

    @property
    def optimizer_steps(self) -> int:
        """Taken so far, those before a checkpoint was loaded included."""
        return int(self._scheduler.num_steps)

    def train_step(
        self, batch: Batch, objective: Objective, clipped: Tensor | None = None
    ) -> dict[str, float]:
        """One optimizer step on the whole mini-batch. If `grad_norm` is not finite, none is taken:
        weights, optimizer and schedule stay as they are.

        Args:
            clipped: [N] int8 zeros on this rank's device. Gets `Result.clipped` of the tokens that
                this rank has computed the loss of.

        Returns:
            the objective's metrics, `grad_norm` before clipping, and `lr`; with
            `moe_aux_loss_coeff`, `load_balancing_loss`, a mean over layers, which is 1 in perfect
            balance and no part of `loss`.
        """
        self._writer.finish(wait=False)
        lr = self._optimizer.param_groups[0]["lr"]
        self._begin_step(len(batch.tokens), objective)
        metrics = self._forward_backward(batch, objective, clipped)
        grad_norm = self._update()
        if math.isfinite(grad_norm):
            self._scheduler.step(increment=1)
        return metrics | {"grad_norm": grad_norm, "lr": lr}

    def _begin_step(self, tokens: int, objective: Objective) -> None:
        get_moe_layer_wise_logging_tracker().clear()
        # The router multiplies by the tokens of each micro-batch, to be divided by all of them.
        coefficient = self.config.moe_aux_loss_coeff / tokens
        self.model.chunks[0].config.moe_aux_loss_coeff = coefficient
        for chunk in self.model.chunks:
            chunk.entropy_gradient = objective.entropy_gradient
        for module in self.model.modules:
            module.train()
            module.zero_grad_buffer()
        self._optimizer.zero_grad()

    def _forward_backward(
        self, batch: Batch, objective: Objective, clipped: Tensor | None
    ) -> dict[str, float]:
        """Adds up gradients; returns the mini-batch's metrics."""
        denominators = objective.denominators(batch.fields, Sequences.whole(batch.lengths))
        fields = {name: values.to(this_device()) for name, values in batch.fields.items()}
        sums: dict[str, Tensor] = {}
        extremes: dict[str, Tensor] = {}

        def contribution(micro: MicroBatch, output: Tensor) -> Tensor:
            result = evaluate_objective(
                objective, micro, output, fields, denominators, sum_over_context_parallel_ranks
            )
            if clipped is not None and result.clipped is not None:
                clipped[micro.targets[micro.targets >= 0]] = result.clipped
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0) + value.detach()
            for name, values in result.extremes.items():
                if len(values):
                    seen = [extremes[name]] if name in extremes else []
                    extremes[name] = torch.stack(torch.cat([values, *seen]).aminmax())
            return result.loss

        self.model.run(batch, contribution, forward_only=False)
        if not is_logging_rank():
            sums, extremes = {}, {}
        for name, layers in get_moe_layer_wise_logging_tracker().items():
            # Each rank has its own tokens' and layers' share of it.
            sums[name] = layers["values"].mean() / len(batch.tokens)
        return _reduce_metrics(sums, extremes)

    def _update(self) -> float:
        """Clips the gradients and steps the optimizer, if they are finite; returns the norm before
        clipping."""
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            return grad_norm
        for part in self._optimizer.chained_optimizers:
            # A part without parameters on this rank has no optimizer inside.
            if self.config.optimizer.clip_grad and not part.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(),
                    max_norm=self.config.optimizer.clip_grad,
                    total_norm=grad_norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
        self._optimizer.step_with_ready_grads()
        return grad_norm

    def save(
        self,
        path: Path,
        state: dict[str, Any],
        save_beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes a Megatron distributed checkpoint. `path` appears once it is complete: before this
        returns, or with `checkpoint.asynchronous` at a later step or in `finish_saves`.

        Args:
            state: `step`, and what else the trainer needs to go on, the same on every rank
                (JSON-like values).
            save_beside: writes more files into the checkpoint's folder, whose name it gets; is
                called on every rank, before this returns.

        Raises:
            UserError: on all ranks, if `save_beside` raises one on any of them.
        """
        self.model.finish_param_gather()
        self._writer.save(
            path, self.model.chunks, self._optimizer, self._scheduler, state, save_beside
        )

    def finish_saves(self) -> None:
        """Waits until every checkpoint begun is complete."""
        self._writer.finish(wait=True)

    def load(self, path: Path) -> dict[str, Any]:
        """Restores weights and optimizer state from `save`, whatever layout wrote them.

        The learning-rate schedule goes on from the step reached, with the settings of this run's
        config. Random states are restored if the layout is the same.

        Returns:
            the trainer's state.
        """
        state = checkpoint.load(path, self.model.chunks, self._optimizer, self._scheduler)
        self._scheduler.step(increment=0)  # computes lr and weight decay from the config's
        return state


def evaluate_objective(
    objective: Objective,
    micro: MicroBatch,
    output: Tensor,
    fields: Fields,
    denominators: Mapping[str, float],
    over_ranks: Callable[[Tensor], Tensor],
) -> Result:
    """What the tokens of a micro-batch contribute to the objective of the whole mini-batch.

    Args:
        output: [2, T] log-probabilities and entropies of the micro-batch's labels.
        fields: [N] each, of the mini-batch.
        over_ranks: sums a tensor over the context-parallel ranks.
    """
    rows = micro.targets >= 0
    log_probs, entropy = output[:, rows]
    mine = {name: values[micro.targets[rows]] for name, values in fields.items()}
    sequences = Sequences(micro.sequences[rows], len(micro.cu_seqlens) - 1, over_ranks)
    return objective(log_probs, entropy, mine, sequences, denominators)


def _reduce_metrics(sums: dict[str, Tensor], extremes: dict[str, Tensor]) -> dict[str, float]:
    """The mini-batch's metrics on every rank, from each rank's share of them."""
    mine = (
        {name: value.item() for name, value in sums.items()},
        {name: values.tolist() for name, values in extremes.items()},
    )
    everyone = objects.all_gather(mine)
    metrics: dict[str, float] = {}
    for rank_sums, _ in everyone:
        for name, value in rank_sums.items():
            metrics[name] = metrics.get(name, 0.0) + value
    for _, rank_extremes in everyone:
        for name, (smallest, largest) in rank_extremes.items():
            metrics[f"{name}_min"] = min(metrics.get(f"{name}_min", math.inf), smallest)
            metrics[f"{name}_max"] = max(metrics.get(f"{name}_max", -math.inf), largest)
    return metrics
