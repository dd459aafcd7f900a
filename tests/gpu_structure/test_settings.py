"""Megatron-Core and Transformer Engine accept what is chosen for a GPU."""

from typing import Any

import pytest
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.optimizers import FusedAdam

from klear_megatron.policy.build import (
    build_optimizer,
    transformer_config,
    wrap_data_parallel,
    wrap_in_half_precision,
)
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.kernels import choose_offload, fp8_runs_on
from tests.gpu_structure.stage import (
    HOPPER,
    RECIPES,
    as_if_on,
    gpu_chunks,
    gpu_kernels,
    policy_config,
    recipe_name,
    standing_at,
    write_config,
)

CLASSES = {
    "delayed": recipes.DelayedScaling,
    "tensorwise": recipes.Float8CurrentScaling,
    "blockwise": recipes.Float8BlockScaling,
    "mxfp8": recipes.MXFP8BlockScaling,
}
CHECKS = {
    "delayed": quantization.check_fp8_support,
    "tensorwise": quantization.check_fp8_support,
    "blockwise": quantization.check_fp8_block_scaling_support,
    "mxfp8": quantization.check_mxfp8_support,
}
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_recipes_run_where_transformer_engine_says(capability, proven):
    with as_if_on(capability):
        theirs = {name: check()[0] for name, check in CHECKS.items()}
    assert {name: fp8_runs_on(name, capability) for name in CHECKS} == theirs
    proven(
        "our table of FP8 recipes and Transformer Engine's own checks agree on compute capability",
        f"{capability[0]}.{capability[1]}",
    )


@pytest.mark.parametrize("fp8", CLASSES)
def test_a_recipe_is_transformer_engines_of_that_name(fp8, tmp_path, proven):
    folder = write_config("Qwen3ForCausalLM", tmp_path)
    config = policy_config(tmp_path, fp8=fp8)
    kernels, capability = gpu_kernels(config, folder)
    with standing_at(config.parallel, 0, 1), as_if_on(capability):
        megatron = transformer_config(config, folder, kernels)
        made = get_fp8_recipe(megatron)
        assert isinstance(made, CLASSES[fp8])
        assert made.fp8_format == recipes.Format.HYBRID
        with get_fp8_context(megatron, layer_no=0):
            assert quantization.FP8GlobalStateManager.is_fp8_enabled()
            assert isinstance(quantization.FP8GlobalStateManager.get_fp8_recipe(), CLASSES[fp8])
    proven("recipes that Transformer Engine enters", f"{fp8} ({CLASSES[fp8].__name__})")


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "overlap": {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    **{
        f"context parallelism by {comm_type}": {
            "parallel": {"context_parallel_size": 2, "context_parallel_comm_type": comm_type}
        }
        for comm_type in ("p2p", "all_gather", "a2a")
    },
    "recompute everything": {"recompute_granularity": "full"},
    **{
        f"recompute {module}": {
            "recompute_granularity": "selective",
            "recompute_modules": [module],
        }
        for module in ("core_attn", "layernorm", "mlp", "moe", "moe_act")
    },
    "load-balancing loss": {"moe_aux_loss_coeff": 0.01},
    "half of the optimizer on the host": {"optimizer": {"lr": 1e-4, "offload_fraction": 0.5}},
}
FOR_EXPERTS = {"recompute moe", "recompute moe_act", "load-balancing loss"}


def _built(config: PolicyConfig, folder: Any) -> Any:
    """The optimizer, and with it everything below, in bfloat16 on the CPU."""
    kernels, capability = gpu_kernels(config, folder)
    offload, warnings = choose_offload(config.optimizer, HOPPER)
    assert not warnings
    with standing_at(config.parallel, 0, 4), as_if_on(capability):
        chunks = gpu_chunks(config, folder, device="cpu")
        modules = wrap_data_parallel(wrap_in_half_precision(chunks), config.parallel, kernels)
        optimizer, _ = build_optimizer(
            config.optimizer, modules, kernels, offload=offload, total_steps=10
        )
    return optimizer


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
        for setting in SETTINGS
        if "Moe" in name or not (FOR_EXPERTS & {setting})
    ],
)
def test_what_is_configured_is_accepted(name, setting, tmp_path, proven):
    settings = SETTINGS[setting]
    optimizer = _built(policy_config(tmp_path, **settings), write_config(name, tmp_path))
    offload = settings.get("optimizer", {}).get("offload_fraction")
    for part in optimizer.chained_optimizers:
        assert isinstance(part.optimizer, HybridDeviceOptimizer if offload else FusedAdam)
    proven(f"{name}: model, DDP and optimizer are built with", setting)


@pytest.mark.parametrize(("fp8", "gather"), RECIPES)
def test_the_settings_of_ddp_and_optimizer_are_accepted_with(fp8, gather, tmp_path, proven):
    """The weights are bfloat16 all the same: rounding them to FP8 needs a kernel."""
    folder = write_config("Qwen3MoeForCausalLM", tmp_path)
    optimizer = _built(policy_config(tmp_path, fp8=fp8, fp8_param_gather=gather), folder)
    for part in optimizer.chained_optimizers:
        assert part.config.fp8_recipe == fp8
        assert part.ddp_config.fp8_param_gather is gather
        assert part.ddp_config.reuse_grad_buf_for_mxfp8_param_ag is (gather and fp8 == "mxfp8")
    proven("DDP and the distributed optimizer take the settings of", recipe_name(fp8, gather))
