"""The trained policy: Megatron's schedule, optimizer and checkpoints behind four verbs."""

import itertools
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.losses import Objective
from klear_megatron.models import get_architecture, padded_vocab_size
from klear_megatron.models.language_model import packed_sequences
from klear_megatron.platform import objects
from klear_megatron.platform.device import this_device
from klear_megatron.policy import checkpoint
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.build import (
    build_model_chunks,
    build_optimizer,
    is_logging_rank,
    wrap_data_parallel,
)
from klear_megatron.policy.config import PolicyConfig, import_extensions
from klear_megatron.policy.kernels import Installed, choose_kernels
from klear_megatron.policy.micro_batches import MicroBatch, build_micro_batch, plan_micro_batches
from klear_megatron.policy.parallel import initialize_model_parallel
from klear_megatron.policy.weights import (
    gather_hf_tensors,
    load_hf_weights,
    local_parameters,
    plain,
)

_logger = logging.getLogger(__name__)


class Policy:
    """A causal language model laid out over all ranks.

    Every method is collective: all ranks call it, with the same arguments. A `Batch` is always the
    whole one; which rank works on which sequences is decided here, so results do not depend on
    the layout.

    Args:
        total_steps: optimizer steps of the learning-rate schedule.
        temperature: of the softmax behind every log-probability.

    Raises:
        UserError: an unknown or unfitting model, or weights that do not match their config.
    """

    def __init__(
        self, config: PolicyConfig, *, total_steps: int, temperature: float = 1.0, seed: int = 0
    ) -> None:
        self.config = config
        import_extensions(config)
        self.hf = read_config(config.path)
        initialize_model_parallel(config.parallel, seed)
        padded = padded_vocab_size(self.hf.vocab_size, config.parallel.tensor_model_parallel_size)
        self._table = list(get_architecture(self.hf).weights(self.hf, padded))
        experts = hasattr(self.hf, "num_experts")
        kernels = choose_kernels(config, Installed.here(), experts=experts)
        if dist.get_rank() == 0:
            for line in kernels.warnings:
                _logger.warning(line)
        self._token_multiple = kernels.token_multiple
        self.chunks = build_model_chunks(config, self.hf, kernels, temperature=temperature)
        load_hf_weights(self.chunks, self._table, config.path)
        self._model = wrap_data_parallel(self.chunks, config.parallel, kernels)
        self._optimizer, self._scheduler = build_optimizer(
            config.optimizer, self._model, kernels, total_steps
        )
        self._writer = checkpoint.CheckpointWriter(config.checkpoint, companions=config.path)

    # ---- the four verbs -------------------------------------------------------------------------

    def train_step(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """One optimizer step on the whole mini-batch.

        Returns:
            the objective's metrics, `grad_norm` before clipping, and `lr`; with
            `moe_aux_loss_coeff`, `load_balancing_loss`, a mean over layers, which is 1 in perfect
            balance and no part of `loss`.

        Raises:
            FloatingPointError: a gradient is not finite; weights and optimizer are unchanged.
        """
        self._writer.finish(wait=False)
        denominators = objective.denominators(batch.fields)
        get_moe_layer_wise_logging_tracker().clear()
        # The router multiplies by the tokens of each micro-batch, to be divided by all of them.
        self.chunks[0].config.moe_aux_loss_coeff = self.config.moe_aux_loss_coeff / len(
            batch.tokens
        )
        for chunk in self._model:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        lr = self._optimizer.param_groups[0]["lr"]

        sums: dict[str, Tensor] = {}
        extremes: dict[str, Tensor] = {}

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            rows = micro.targets >= 0
            if not rows.any():  # a pack of padding alone
                return output.sum() * 0, torch.zeros((), dtype=torch.int), {}
            log_probs, entropy = output[:, rows]
            fields = {k: v.to(rows.device)[micro.targets[rows]] for k, v in batch.fields.items()}
            result = objective(log_probs, entropy.detach(), fields, denominators)
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0) + value.detach()
            for name, values in result.extremes.items():
                seen = [extremes[name]] if name in extremes else []
                extremes[name] = torch.stack(torch.cat([values, *seen]).aminmax())
            return result.loss, torch.zeros((), dtype=torch.int), {}

        self._run(batch, loss, forward_only=False)
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm {grad_norm}: the step was not taken")
        self._optimizer.step()
        self._scheduler.step(increment=1)
        if not is_logging_rank():
            sums, extremes = {}, {}
        for name, layers in get_moe_layer_wise_logging_tracker().items():
            # Each rank has its own tokens' and layers' share of it.
            sums[name] = layers["values"].mean() / len(batch.tokens)
        return _reduce_metrics(sums, extremes) | {"grad_norm": grad_norm, "lr": lr}

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every token, [N] float32 each, on the CPU of every rank.

        The first token of each sequence, which nothing predicts, has 0 in both.
        """
        for chunk in self._model:
            chunk.eval()
        result = torch.zeros(2, len(batch.tokens), device=this_device())

        def collect(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            if is_logging_rank():
                rows = micro.targets >= 0
                result[:, micro.targets[rows]] = output[:, rows].float()
            return output.new_zeros(()), torch.zeros((), dtype=torch.int), {}

        self._run(batch, collect, forward_only=True)
        # Every token was computed by exactly one logging rank; everyone else holds zeros.
        dist.all_reduce(result)
        log_probs, entropy = result.cpu()
        return log_probs, entropy

    def named_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Streams the full weights under Hugging Face names, on global rank 0.

        Every rank must iterate to the end; ranks other than 0 are given nothing.
        """
        self._finish_param_gather()
        shards = {n: plain(p) for n, p in local_parameters(self.chunks).items()}
        return gather_hf_tensors(shards, self._table)

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Writes a Megatron distributed checkpoint; `path` appears only once it is complete, which
        with `checkpoint.asynchronous` is at a later step, or at `finish_saves`.

        Args:
            state: what the trainer needs to go on, the same on every rank (JSON-like values).
        """
        self._finish_param_gather()
        self._writer.save(path, self.chunks, self._optimizer, self._scheduler, state)

    def finish_saves(self) -> None:
        """Waits until every checkpoint begun is complete."""
        self._writer.finish(wait=True)

    def load(self, path: Path) -> dict[str, Any]:
        """Restores weights, optimizer and schedule from `save`, in whatever layout it ran, and
        random states if that was the same.

        Returns:
            the trainer's state.
        """
        return checkpoint.load(path, self.chunks, self._optimizer, self._scheduler)

    def _finish_param_gather(self) -> None:
        """With overlap, updated weights are gathered by the forward that needs them: not yet."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self._model:
                chunk.start_param_sync(force_sync=True)

    # ---- Megatron's schedule --------------------------------------------------------------------

    def _run(self, batch: Batch, loss: Any, *, forward_only: bool) -> None:
        parallel = self.config.parallel
        cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
        virtual = parallel.virtual_pipeline_model_parallel_size
        plan = plan_micro_batches(
            batch.lengths,
            parallel_state.get_data_parallel_world_size(),
            self.config.tokens_per_micro_batch * cp,
            multiple_of=parallel.pipeline_model_parallel_size if virtual else 1,
        )[parallel_state.get_data_parallel_rank()]
        build = partial(
            build_micro_batch,
            batch,
            # Zig-zag chunks for context parallelism, equal shares for sequence parallelism.
            align=tp * (2 * cp if cp > 1 else 1) * self._token_multiple,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=cp,
        )
        micro_batches = (build(sequences).to(this_device()) for sequences in plan)
        iterators = list(itertools.tee(micro_batches, len(self._model)))
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, loss),
            data_iterator=iterators if virtual else iterators[0],
            model=self._model if virtual else self._model[0],
            num_microbatches=len(plan),
            seq_length=self.config.tokens_per_micro_batch,  # the real one travels with each pack
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _forward_step(loss: Any, iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    micro = next(iterator)
    packed = packed_sequences(micro.cu_seqlens, micro.max_seqlen)
    output = model(
        micro.tokens[None],
        micro.position_ids[None],
        None,
        labels=micro.labels[None],
        packed_seq_params=packed,
        padding_mask=micro.padding[None],
    )
    return output, partial(loss, micro)


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
