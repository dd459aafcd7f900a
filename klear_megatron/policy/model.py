"""A causal language model laid out over all ranks, behind Megatron's schedule."""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from klear_megatron.checkpoints.megatron_folder import is_megatron_checkpoint, newest_in
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.checkpoints.model_folder import ModelFolder, config_of
from klear_megatron.models import padded_vocab_size
from klear_megatron.models.language_model import packed_sequences
from klear_megatron.platform import heartbeat
from klear_megatron.platform.device import this_device
from klear_megatron.platform.tensors import PlacedTensor
from klear_megatron.policy import checkpoint
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.build import build_model_chunks, is_logging_rank, wrap_in_half_precision
from klear_megatron.policy.config import ModelConfig
from klear_megatron.policy.kernels import Installed, choose_kernels, warn
from klear_megatron.policy.micro_batches import MicroBatch, build_micro_batch
from klear_megatron.policy.packing import plan_micro_batches
from klear_megatron.policy.parallel import initialize_model_parallel
from klear_megatron.policy.weights import (
    HFGather,
    load_hf_weights,
    load_megatron_weights,
    local_parameters,
    plain,
)

Contribution = Callable[[MicroBatch, Tensor], Tensor]
"""(micro-batch, the last stage's output [2, T]) -> scalar to sum up and differentiate."""


class Model:
    """A model whose every method is collective: all ranks call it, with the same arguments.

    A `Batch` is always the whole one. Which rank works on which sequences is decided here, so
    results do not depend on the parallel layout. Several models of one layout can live in one
    process; they share Megatron's process groups.

    Args:
        folder: gives the model's config; `load` reads the weights.
        temperature: divides the logits before the softmax of every log-probability.
        seed: seeds the random states, if this is the first model of the process.

    Raises:
        UserError: an unknown model, or one that cannot be cut as configured.
    """

    def __init__(
        self, config: ModelConfig, folder: ModelFolder, *, temperature: float = 1.0, seed: int = 0
    ) -> None:
        self.config = config
        self.folder = folder
        initialize_model_parallel(config.parallel, seed)
        tp = config.parallel.tensor_model_parallel_size
        self.table = folder.table(padded_vocab_size(folder.config.vocab_size, tp))
        self.kernels = choose_kernels(config, Installed.here(), experts=folder.num_experts > 0)
        warn(self.kernels.warnings)
        self.chunks = build_model_chunks(config, folder, self.kernels, temperature=temperature)
        """This rank's pipeline stage, one chunk per virtual stage."""
        self.modules: list[Any] = wrap_in_half_precision(self.chunks)
        """The chunks as Megatron's schedule takes them; a learner wraps them once more."""

    def load(self, path: Path) -> None:
        """Fills in the weights from a Hugging Face folder or a Megatron checkpoint, of this package
        or of Megatron-LM, Megatron-Bridge or slime; a root stands for its newest checkpoint.

        Raises:
            UserError: the weights are not those of the model's config, or cannot be read.
        """
        path = newest_in(path)
        if not is_megatron_checkpoint(path):
            load_hf_weights(self.chunks, self.table, path)
        elif (path / "hf").is_dir():  # of this package
            checkpoint.load_weights(path, self.chunks)
        else:
            source = MegatronCheckpoint(path)
            with config_of(source, self.folder.path) as folder:
                load_megatron_weights(self.chunks, self.table, source, folder.config)

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every token, [N] float32 each, on the CPU of every rank.

        The first token of each sequence, which nothing predicts, has 0 in both.
        """
        for module in self.modules:
            module.eval()
        result = torch.zeros(2, len(batch.tokens), device=this_device())

        def collect(micro: MicroBatch, output: Tensor) -> Tensor:
            if is_logging_rank():
                rows = micro.targets >= 0
                result[:, micro.targets[rows]] = output[:, rows].float()
            return output.new_zeros(())

        self.run(batch, collect, forward_only=True)
        # Every token was computed by exactly one logging rank; everyone else holds zeros.
        dist.all_reduce(result)
        log_probs, entropy = result.cpu()
        return log_probs, entropy

    def named_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Streams the full weights under Hugging Face names, on global rank 0.

        Every rank must iterate to the end; ranks other than 0 are given nothing.
        """
        return self._stream(self._gather(to_rank=0))

    @property
    def placed_hf_tensors(self) -> list[PlacedTensor]:
        """All full weights under Hugging Face names, in the order of `own_hf_tensors`, and the rank
        that each is given to there."""
        return self._own_gather.tensors

    def own_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Streams full weights under Hugging Face names, each on the lowest rank that holds a part
        of it. Every rank must iterate to the end."""
        return self._stream(self._own_gather)

    @cached_property
    def _own_gather(self) -> HFGather:
        return self._gather(to_rank=None)

    def _gather(self, to_rank: int | None) -> HFGather:
        dtypes = {name: p.dtype for name, p in local_parameters(self.chunks).items()}
        return HFGather(dtypes, self.table, to_rank)

    def _stream(self, gather: HFGather) -> Iterator[tuple[str, Tensor]]:
        self.finish_param_gather()
        parameters = local_parameters(self.chunks)
        return gather.stream(lambda name: plain(parameters[name]))

    def finish_param_gather(self) -> None:
        """With overlap_param_gather, parameters are stale until the next forward; gather them now.

        Call this before reading parameters in any other way than by a forward.
        """
        if self.config.parallel.overlap_param_gather:
            for module in self.modules:
                if isinstance(module, DistributedDataParallel):
                    module.start_param_sync(force_sync=True)

    def run(self, batch: Batch, contribution: Contribution, *, forward_only: bool) -> None:
        """Takes the batch through Megatron's forward-backward schedule, pack by pack.

        Args:
            contribution: called on the last pipeline stage of every rank for each of its packs.
        """
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
            align=tp * (2 * cp if cp > 1 else 1) * self.kernels.token_multiple,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=cp,
        )
        micro_batches = (build(sequences).to(this_device()) for sequences in plan)
        iterators = list(itertools.tee(micro_batches, len(self.modules)))
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, contribution),
            data_iterator=iterators if virtual else iterators[0],
            model=self.modules if virtual else self.modules[0],
            num_microbatches=len(plan),
            seq_length=self.config.tokens_per_micro_batch,  # the real one travels with each pack
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _forward_step(
    contribution: Contribution, iterator: Iterator[MicroBatch], module: Any
) -> tuple[Tensor, Any]:
    heartbeat.beat()
    micro = next(iterator)
    output = module(
        micro.tokens[None],
        micro.position_ids[None],
        None,
        labels=micro.labels[None],
        packed_seq_params=packed_sequences(micro.cu_seqlens, micro.max_seqlen),
        padding_mask=micro.padding[None],
    )

    def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        # Megatron would divide by a number of tokens; ours are divided already.
        return contribution(micro, output), torch.zeros((), dtype=torch.int), {}

    return output, loss
