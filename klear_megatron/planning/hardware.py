"""What a GPU can do: the numbers of data sheets, and the constants fitted to measurements."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, PositiveInt

from klear_megatron.config import Section
from klear_megatron.config.loading import load_config, validate
from klear_megatron.errors import UserError, nearest
from klear_megatron.policy.kernels import Installed


class Peak(Section):
    """Peak FLOP/s of matrix products."""

    float32: PositiveFloat
    bfloat16: PositiveFloat
    fp8: PositiveFloat | None = None


class Efficiency(Section):
    """What of a peak is reached. Each of the first four is fitted to one row of `published.yaml`,
    the one that names it under `fitted`."""

    matrix: float = Field(0.594, gt=0, le=1)
    """Matrix products in bfloat16 or float32."""
    matrix_fp8: float = Field(0.467, gt=0, le=1)
    """Matrix products in FP8, with their casts, of FP8's peak."""
    attention: float = Field(0.551, gt=0, le=1)
    """Attention in bfloat16, of bfloat16's peak."""
    expert: float = Field(0.597, gt=0, le=1)
    """Experts' matrix products, relative to a dense layer's."""
    bandwidth: float = Field(0.8, gt=0, le=1)
    """Memory and links; assumed."""


class Hardware(Section):
    """One kind of GPU, and what joins them. `hardware.yaml` describes the fields."""

    memory: PositiveFloat
    bandwidth: PositiveFloat
    flops: Peak
    compute_capability: tuple[int, int] | None
    node_gpus: PositiveInt
    node_link: PositiveFloat
    network: PositiveFloat
    sources: str
    efficiency: Efficiency = Efficiency()
    overhead_bytes: float = Field(4 * 2**30, ge=0)
    """CUDA's context, NCCL's buffers and what the allocator cannot use; assumed."""
    transformer_engine: bool = True
    apex: bool = True

    @property
    def installed(self) -> Installed:
        """What the choice of kernels asks for."""
        gpu = self.compute_capability is not None
        return Installed(
            self.compute_capability, gpu and self.transformer_engine, gpu and self.apex
        )


@cache
def _table() -> dict[str, Any]:
    text = (files(__package__) / "hardware.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def read_hardware(name: str) -> Hardware:
    """The hardware of that name, such as h100, or in the YAML file of that path.

    Raises:
        UserError: there is neither.
    """
    known = _table()
    if name in known:
        return validate(Hardware, known[name], f"hardware.yaml: {name}:")
    if name.endswith((".yaml", ".yml")):
        return load_config(Hardware, Path(name))
    raise UserError(
        f"--gpu {name}: unknown GPU; {nearest(name, known)} A YAML file describes others: its "
        "fields are in klear_megatron/planning/hardware.yaml"
    )
