"""What tests do with a `Learner` on every rank: logits, log-probs, gradients under their HF names.

Functions here run on ranks started by `tests.distributed.ranks.run_ranks`, many layouts after one
another in the same processes.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import Objective
from klear_megatron.models.language_model import packed_sequences
from klear_megatron.policy import build
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import PolicyConfig, import_extensions
from klear_megatron.policy.learner import Learner
from klear_megatron.policy.micro_batches import build_micro_batch
from klear_megatron.policy.weights import HFGather, local_parameters

SMALL_BUCKET = 5000
"""Elements."""
RANKS_FORK_WRITERS = hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc")
"""In Megatron-Core 0.16. In 0.19 a rank that waits for a save writes it itself."""


def make_learner(path: Path, *, temperature: float = 1.0, **settings: Any) -> Learner:
    """A learner, in float32 unless told otherwise, with its own groups; destroys earlier groups."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel = settings.pop("parallel", {})
    optimizer = {"lr": 1e-3, "weight_decay": 0.1} | settings.pop("optimizer", {})
    defaults = {"dtype": "float32", "tokens_per_micro_batch": 64}
    config = PolicyConfig.model_validate(
        {**defaults, "path": path, "parallel": parallel, "optimizer": optimizer, **settings}
    )
    import_extensions(config)
    buckets = small_buckets() if config.parallel.overlap_grad_reduce else contextlib.nullcontext()
    with buckets:
        return Learner(
            config, ModelFolder(config.hf_folder), total_steps=10, temperature=temperature
        )


def small_buckets() -> Any:
    """While it lasts, overlapped communication goes in many small buckets; Megatron's default is
    larger than the tests' models."""
    small = partial(DistributedDataParallelConfig, bucket_size=SMALL_BUCKET)
    return mock.patch.object(build, "DistributedDataParallelConfig", small)


def weights(learner: Learner) -> dict[str, Tensor]:
    """Full tensors by Hugging Face name; empty on ranks other than 0."""
    return {name: tensor.clone() for name, tensor in learner.model.named_hf_tensors()}


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Full gradients by Hugging Face name, as the optimizer is about to see them."""
    for model in learner.model.modules:
        for buffer in [*model.buffers, *model.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:  # each rank has summed its own share only
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)
    shards = {n: p.main_grad for n, p in local_parameters(learner.model.chunks).items()}
    dtypes = {name: shard.dtype for name, shard in shards.items()}
    stream = HFGather(dtypes, learner.model.table, to_rank=0).stream(shards.__getitem__)
    return {name: tensor.clone() for name, tensor in stream}


def train(
    learner: Learner, batches: Sequence[Batch], objective: Objective
) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """One step per batch: its metrics, and the gradients before clipping."""
    captured: list[dict[str, Tensor]] = []
    prepare = learner._optimizer.prepare_grads

    def capture_first() -> Any:
        captured.append(gradients(learner))
        return prepare()

    learner._optimizer.prepare_grads = capture_first
    return [(learner.train_step(batch, objective), captured[-1]) for batch in batches]


@torch.no_grad()
def logits(learner: Learner, sequences: list[list[int]]) -> Tensor | None:
    """[tokens of all sequences, vocabulary] through Megatron's schedule, packed into one row.

    None where the last pipeline stage is not. Context parallelism apart.
    """
    batch = Batch.from_sequences(sequences)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    micro = build_micro_batch(batch, range(len(sequences)), align=tp)
    packed = packed_sequences(micro.cu_seqlens, micro.max_seqlen)

    def forward_step(_: Any, model: Any) -> tuple[Tensor, Any]:
        inputs = micro.tokens[None], micro.position_ids[None], None
        return model(*inputs, packed_seq_params=packed), lambda output: (
            output.new_zeros(()),
            torch.zeros((), dtype=torch.int),
            output,
        )

    for chunk in learner.model.modules:
        chunk.eval()
    virtual = len(learner.model.modules) > 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(()) for _ in learner.model.modules] if virtual else iter(()),
        model=learner.model.modules if virtual else learner.model.modules[0],
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
        seq_length=len(micro.tokens),
        micro_batch_size=1,
        forward_only=True,
    )
    if not outputs:
        return None
    pieces = [torch.empty_like(outputs[0]) for _ in range(tp)]
    dist.all_gather(
        pieces, outputs[0].contiguous(), group=parallel_state.get_tensor_model_parallel_group()
    )
    padded = torch.cat(pieces, -1)[0, :, : learner.model.folder.config.vocab_size]
    rows = [
        padded[start : start + length]
        for start, length in zip(micro.cu_seqlens[:-1].tolist(), batch.lengths, strict=True)
    ]
    return torch.cat(rows)
