"""Building Megatron model chunks from a Hugging Face config, and wrapping them for training."""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.platform.device import this_device
from klear_megatron.policy.config import ModelConfig, OptimizerConfig, ParallelConfig
from klear_megatron.policy.kernels import Kernels


def transformer_config(
    config: ModelConfig, folder: ModelFolder, kernels: Kernels
) -> TransformerConfig:
    """Megatron's TransformerConfig for this model in this layout with these kernels."""
    fields = folder.architecture.transformer_config(folder.config)
    fields["activation_func"] = getattr(torch.nn.functional, fields["activation_func"])
    _, rotary_scaling = folder.architecture.rotary(folder.config)
    # YaRN scales cos and sin of both queries and keys; scaling their products is the same.
    fields["softmax_scale"] = rotary_scaling**2 / math.sqrt(fields["kv_channels"])
    parallel = config.parallel
    dtype = getattr(torch, config.dtype)
    full_recompute = config.recompute_granularity == "full"
    return TransformerConfig(
        **fields,
        **kernels.transformer,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        bf16=config.dtype == "bfloat16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,
        # With two interleaved stages, one is both neighbours of the other: no batched exchange.
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        moe_token_dispatcher_type="alltoall",  # the one that takes variable lengths
        moe_router_load_balancing_type="aux_loss" if config.moe_aux_loss_coeff else "none",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        recompute_granularity=config.recompute_granularity,
        recompute_method="uniform" if full_recompute else None,
        recompute_num_layers=1 if full_recompute else None,
        # Losses arrive divided by the whole mini-batch's denominators. Gradients are plain sums
        # over micro-batches and ranks; nothing is divided afterwards.
        calculate_per_token_loss=True,
        finalize_model_grads_func=_sum_model_grads,
    )


def _sum_model_grads(model: list[Any], num_tokens: object = None, **groups: Any) -> None:
    finalize_model_grads(model, None, **groups)


def build_model_chunks(
    config: ModelConfig, folder: ModelFolder, kernels: Kernels, *, temperature: float
) -> list[LanguageModel]:
    """This rank's pipeline stage, as one chunk per virtual stage, with uninitialised weights.

    Raises:
        UserError: unknown architecture, or a model that cannot be cut as configured.
    """
    config.parallel.check_model(folder)
    megatron = transformer_config(config, folder, kernels)
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    return [
        LanguageModel(megatron, folder.config, temperature=temperature, vp_stage=stage).to(
            this_device()
        )
        for stage in (range(virtual) if virtual else [None])
    ]


def wrap_in_half_precision(chunks: list[LanguageModel]) -> list[Any]:
    """Wraps bfloat16 chunks in Megatron's conversion of their inputs and outputs."""
    config = chunks[0].config
    return [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]


def wrap_data_parallel(
    modules: list[Any], parallel: ParallelConfig, kernels: Kernels
) -> list[DistributedDataParallel]:
    """Megatron's DDP with the distributed optimizer's float32 gradient buffers."""
    config = modules[0].config
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=kernels.fp8_param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=kernels.mxfp8_param_gather,
    )
    model = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    if parallel.overlap_grad_reduce:
        # The schedule holds the reduction back until the last micro-batch.
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


def build_optimizer(
    config: OptimizerConfig,
    model: list[DistributedDataParallel],
    kernels: Kernels,
    *,
    offload: float,
    total_steps: int,
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Megatron's distributed Adam and its schedule over `total_steps` optimizer steps.

    Args:
        offload: share of the optimizer's state that is kept, and stepped, on the host.
    """
    megatron = model[0].config
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=megatron.bf16,
            params_dtype=megatron.params_dtype,
            use_distributed_optimizer=True,
            fp8_recipe=megatron.fp8_recipe if megatron.fp8 else None,
            reuse_grad_buf_for_mxfp8_param_ag=kernels.mxfp8_param_gather,
            optimizer_cpu_offload=offload > 0,
            optimizer_offload_fraction=offload,
            # Megatron's offloading needs gradients kept the way this optimizer keeps them.
            use_precision_aware_optimizer=offload > 0,
        ),
        model,
    )
    _allocate_state(optimizer)
    return optimizer, _schedule(optimizer, config, total_steps)


def _schedule(
    optimizer: ChainedOptimizer, config: OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(total_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        # A resumed run goes by its config; the checkpoint only gives the number of steps done.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _allocate_state(optimizer: ChainedOptimizer) -> None:
    """Torch's Adam makes its state at the first step, but loading a checkpoint needs it before."""
    for part in optimizer.chained_optimizers:
        if isinstance(adam := part.optimizer, torch.optim.AdamW):
            for parameter in (p for group in adam.param_groups for p in group["params"]):
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def is_logging_rank() -> bool:
    """Whether this rank's metrics count, among the ranks that work on the same tokens.

    The loss is on the last pipeline stage. Its tensor-parallel ranks all have the same loss, so
    the first of them counts.
    """
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )
