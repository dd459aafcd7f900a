"""What has to fit together for training on GPUs, and what to do where it does not.

Each check is of versions alone, so it is the same on any machine.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

_DRIVER_OF_CUDA = {12: 525, 13: 580}
"""The oldest driver of each CUDA major (CUDA Toolkit release notes)."""
_LOADED_DRIVER = Path("/sys/module/nvidia/version")
_ANY = SpecifierSet()
_PACKED_ATTENTION = (9, 0)
"""cuDNN attends to packed sequences from this compute capability on (Transformer Engine,
`nvte_get_fused_attn_backend`)."""


@dataclass(frozen=True, kw_only=True)
class GpuSoftware:
    """The versions found on a host. None is for what is not there."""

    cuda: str | None
    """What torch is built for, as in "13.0"."""
    driver: str | None
    compute_capability: tuple[int, int] | None
    engine: str | None
    """Transformer Engine's version."""
    engine_error: str | None = None
    """Why Transformer Engine, or Megatron-Core with it, cannot be imported."""
    engine_cuda: tuple[int, ...] = ()
    """The CUDA majors of Transformer Engine's installed core libraries."""
    engine_range: SpecifierSet = _ANY
    """The versions of Transformer Engine that Megatron-Core asks for."""
    megatron_core: str = ""
    flash_attn: str | None = None
    flash_attn_range: SpecifierSet = _ANY
    """The versions of flash-attn that Transformer Engine uses."""
    nccl: str | None = None
    refused_recipes: dict[str, str] = field(default_factory=dict)
    """FP8 recipe -> why Transformer Engine does not run it here, of those that this package would
    choose."""

    def problems(self, servers_nccl: str | None) -> list[str]:
        """What does not fit, and what to do about it.

        Args:
            servers_nccl: the version of NCCL in the servers' environment.
        """
        checks: list[Callable[[], str | None]] = [
            self._old_driver,
            self._core_of_other_cuda,
            self._engine_out_of_range,
            self._broken_engine,
            self._flash_attn_out_of_range,
            self._slow_packed_attention,
            lambda: self._two_nccls(servers_nccl),
        ]
        found = [problem for check in checks if (problem := check())]
        return [
            *found,
            *(
                f"policy.fp8: {recipe} does not run here, says Transformer Engine: {reason}"
                for recipe, reason in self.refused_recipes.items()
            ),
        ]

    @property
    def engine_works(self) -> bool:
        """Whether Megatron-Core can build its layers of it."""
        return self.engine is not None and self.engine_error is None

    @property
    def _cuda_major(self) -> int | None:
        return int(self.cuda.split(".")[0]) if self.cuda else None

    def _old_driver(self) -> str | None:
        oldest = _DRIVER_OF_CUDA.get(self._cuda_major or 0)
        if oldest is None or self.driver is None or Version(self.driver) >= Version(str(oldest)):
            return None
        return (
            f"torch is built for CUDA {self.cuda}, which needs driver {oldest} or newer, and the "
            f"driver is {self.driver}: update it"
        )

    def _core_of_other_cuda(self) -> str | None:
        major = self._cuda_major
        if self.engine is None or major is None or self.engine_cuda == (major,):
            return None
        there = " and ".join(str(cuda) for cuda in self.engine_cuda) or "none"
        return (
            f"torch is built for CUDA {major}, and Transformer Engine's core library for {there}: "
            f"`pip uninstall transformer-engine-cu12 transformer-engine-cu13`, then `pip install "
            f"transformer-engine-cu{major}=={self.engine}`"
        )

    def _engine_out_of_range(self) -> str | None:
        if self.engine is None or self.engine_range.contains(self.engine, prereleases=True):
            return None
        return (
            f"Megatron-Core {self.megatron_core} asks for Transformer Engine {self.engine_range}, "
            f"and {self.engine} is installed: install what requirements/gpu.txt names"
        )

    def _broken_engine(self) -> str | None:
        if self.engine is None or self.engine_error is None:
            return None
        return (
            f"Transformer Engine {self.engine} is installed but cannot be used: "
            f"{self.engine_error}; build it against this torch: "
            "`bash tools/install_transformer_engine.sh .venv`"
        )

    @property
    def _flash_attn_is_used(self) -> bool:
        return self.flash_attn is not None and self.flash_attn_range.contains(self.flash_attn)

    def _flash_attn_out_of_range(self) -> str | None:
        if self.engine is None or self.flash_attn is None or self._flash_attn_is_used:
            return None
        return (
            f"Transformer Engine {self.engine} uses flash-attn {self.flash_attn_range} and ignores "
            f"{self.flash_attn}, which is installed: install one of those, or none"
        )

    def _slow_packed_attention(self) -> str | None:
        if (
            self.engine is None
            or self.compute_capability is None
            or self.compute_capability >= _PACKED_ATTENTION
            or self._flash_attn_is_used
        ):
            return None
        return (
            "on this GPU cuDNN does not attend to packed sequences, and without flash-attn "
            "Transformer Engine keeps the scores of all pairs of tokens: install flash-attn "
            f"{self.flash_attn_range}"
        )

    def _two_nccls(self, servers: str | None) -> str | None:
        if None in (self.nccl, servers) or self.nccl == servers:
            return None
        return (
            f"the trainer has NCCL {self.nccl} and the servers have {servers}, which must "
            "not meet in one process group: install the same torch in both environments"
        )


def find_gpu_software() -> GpuSoftware:
    """Looks at this host and this environment."""
    import torch

    has_gpu = torch.cuda.is_available()
    engine = version("transformer-engine")
    error = _engine_error() if engine else None
    works = engine is not None and error is None
    return GpuSoftware(
        cuda=torch.version.cuda,
        driver=_LOADED_DRIVER.read_text().strip() if _LOADED_DRIVER.is_file() else None,
        compute_capability=torch.cuda.get_device_capability() if has_gpu else None,
        engine=engine,
        engine_error=error,
        engine_cuda=tuple(m for m in _DRIVER_OF_CUDA if version(f"transformer-engine-cu{m}")),
        engine_range=_engine_range(),
        megatron_core=version("megatron-core") or "",
        flash_attn=version("flash-attn"),
        flash_attn_range=_flash_attn_range() if works else _ANY,
        nccl=version("nvidia-nccl-cu13") or version("nvidia-nccl-cu12"),
        refused_recipes=_refused_recipes() if works and has_gpu else {},
    )


def version(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine_error() -> str | None:
    try:
        import transformer_engine.pytorch  # noqa: F401
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except Exception as error:  # whatever the loading of its libraries raises
        return f"{type(error).__name__}: {error}"
    return None if HAVE_TE else "Megatron-Core does not recognise it"


def _engine_range() -> SpecifierSet:
    """Megatron-Core names the versions in an extra that nobody has to install."""
    wanted = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or []]
    ranges = [r.specifier for r in wanted if r.name == "transformer-engine" and r.specifier]
    return ranges[0] if ranges else _ANY


def _flash_attn_range() -> SpecifierSet:
    import torch
    from transformer_engine.pytorch.attention.dot_product_attention.utils import (
        FlashAttentionUtils,
    )

    blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)
    oldest = (
        FlashAttentionUtils.version_required_blackwell
        if blackwell
        else FlashAttentionUtils.version_required
    )
    return SpecifierSet(f">={oldest},<{FlashAttentionUtils.max_version}")


def _refused_recipes() -> dict[str, str]:
    from transformer_engine.pytorch import quantization

    from klear_megatron.policy.kernels import Installed, fp8_runs_on

    answers = {
        "delayed": quantization.check_fp8_support,
        "tensorwise": quantization.check_fp8_support,
        "blockwise": quantization.check_fp8_block_scaling_support,
        "mxfp8": quantization.check_mxfp8_support,
    }
    capability = Installed.here().compute_capability
    return {
        recipe: reason
        for recipe, check in answers.items()
        for runs, reason in [check()]
        if fp8_runs_on(recipe, capability) and not runs
    }
