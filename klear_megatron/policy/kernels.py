"""Which kernels a run gets, given what it asks for and what is installed.

The choice is pure: the same question has the same answer on any machine. A kernel that is not
available is replaced by one that computes the same, with a one-line warning. Importing this module
does not import torch, so that a run can be planned in a second.
"""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

from klear_megatron.policy.config import ModelConfig, OptimizerConfig

_logger = logging.getLogger(__name__)

_FP8_CAPABILITY = {
    "delayed": ((8, 9), None),
    "tensorwise": ((8, 9), None),
    "blockwise": ((9, 0), None),
    "mxfp8": ((10, 0), (12, 0)),
}
"""The oldest compute capability that each FP8 recipe runs on, and the first that it does not run on
any more (Transformer Engine 2.20, `quantization.py`)."""
_NEED_TRANSFORMER_ENGINE = ("layernorm", "moe_act")
"""Recomputable modules whose recomputation Megatron-Core leaves to Transformer Engine."""


@dataclass(frozen=True)
class Installed:
    """The hardware and libraries that a run can compute with."""

    compute_capability: tuple[int, int] | None
    """The GPU's; None without a GPU."""
    transformer_engine: bool
    """Whether it can be imported, and Megatron-Core uses it."""
    apex: bool
    """NVIDIA's Apex with its kernel that accumulates weight gradients in place."""

    @classmethod
    def here(cls) -> "Installed":
        """What this process finds."""
        import torch
        from megatron.core.extensions.transformer_engine import HAVE_TE

        from klear_megatron.platform.device import HAS_GPU

        return cls(
            torch.cuda.get_device_capability() if HAS_GPU else None,
            HAVE_TE,
            importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        )


@dataclass(frozen=True)
class Kernels:
    """The kernels to use."""

    transformer: dict[str, Any]
    """Fields of Megatron's TransformerConfig."""
    fp8_param_gather: bool
    token_multiple: int
    """A rank's tokens of a micro-batch must be a multiple of this."""
    warnings: list[str]
    """One line for each thing that was asked for and is not available."""

    @property
    def mxfp8_param_gather(self) -> bool:
        """MXFP8 weights cannot be gathered in place; Megatron uses the gradient buffer."""
        return self.fp8_param_gather and self.transformer["fp8_recipe"] == "mxfp8"


def choose_kernels(config: ModelConfig, installed: Installed, *, experts: bool) -> Kernels:
    """Chooses the kernels of a model; `experts` says whether it is a mixture of experts."""
    gpu = installed.compute_capability is not None
    engine = gpu and installed.transformer_engine
    warnings: list[str] = []
    if gpu and not engine:
        warnings.append(
            "Transformer Engine is not installed or, as `klear-megatron doctor` would say, broken: "
            "layers are plain PyTorch, slower and without FP8"
        )
    if gpu and not installed.apex:
        warnings.append(
            "NVIDIA's Apex is not installed: weight gradients are accumulated in a separate kernel"
        )
    recipe = _fp8_recipe(config, installed, warnings)
    modules = _recompute_modules(config, warnings, engine=engine, experts=experts)
    return Kernels(
        transformer={
            "transformer_impl": "transformer_engine" if engine else "local",
            "fp8": "hybrid" if recipe else None,
            "fp8_recipe": recipe or "delayed",
            "fp8_param": bool(recipe) and config.fp8_param_gather,
            "recompute_modules": modules,
            "cp_comm_type": config.parallel.context_parallel_comm_type if engine else None,
            "gradient_accumulation_fusion": gpu and installed.apex,
            "bias_activation_fusion": gpu,
            "masked_softmax_fusion": gpu,
            "bias_dropout_fusion": gpu,
            "persist_layer_norm": gpu,
            "apply_rope_fusion": engine,
            "moe_grouped_gemm": engine and experts,
            "moe_permute_fusion": engine and experts,
        },
        fp8_param_gather=bool(recipe) and config.fp8_param_gather,
        token_multiple={None: 1, "mxfp8": 32}.get(recipe, 16),
        warnings=warnings,
    )


def fp8_runs_on(recipe: str, compute_capability: tuple[int, int] | None) -> bool:
    """Whether a GPU of this compute capability has the recipe's kernels."""
    oldest, ended = _FP8_CAPABILITY[recipe]
    return (
        compute_capability is not None
        and compute_capability >= oldest
        and (ended is None or compute_capability < ended)
    )


def _fp8_recipe(config: ModelConfig, installed: Installed, warnings: list[str]) -> str | None:
    recipe = config.fp8
    if recipe is None or (
        installed.transformer_engine and fp8_runs_on(recipe, installed.compute_capability)
    ):
        return recipe
    (major, minor), ended = _FP8_CAPABILITY[recipe]
    below = f" and below {ended[0]}.{ended[1]}" if ended else " or newer"
    warnings.append(
        f"policy.fp8: {recipe} needs Transformer Engine and a GPU of compute capability "
        f"{major}.{minor}{below}: training in {config.dtype} instead"
    )
    return None


def _recompute_modules(
    config: ModelConfig, warnings: list[str], *, engine: bool, experts: bool
) -> list[str]:
    modules: list[str] = list(config.recompute_modules)
    if config.recompute_granularity != "selective":
        return modules
    missing = {
        **({} if engine else dict.fromkeys(_NEED_TRANSFORMER_ENGINE, "Transformer Engine")),
        **({} if experts else {"moe_act": "a mixture of experts"}),
    }
    for module in sorted(set(modules) & missing.keys()):
        modules.remove(module)
        warnings.append(
            f"policy.recompute_modules: {module} needs {missing[module]}: its activations are kept"
        )
    return modules


def choose_offload(config: OptimizerConfig, installed: Installed) -> tuple[float, list[str]]:
    """Share of the optimizer's state to offload, and a warning if it is not what was asked for."""
    if config.offload_fraction and installed.compute_capability is None:
        return 0.0, ["policy.optimizer.offload_fraction: without a GPU, all of it is on the host"]
    return config.offload_fraction, []


def warn(lines: list[str]) -> None:
    """Logs each line once, on the first rank."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        for line in lines:
            _logger.warning(line)
