"""Settings of a scaling experiment, and the points that it measures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from klear_megatron.config import Section, validate
from klear_megatron.policy.config import ParallelConfig, PolicyConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
"""It becomes part of a file's name."""


class LayoutConfig(Section):
    """A number of ranks, and how the model is laid out over them."""

    ranks: PositiveInt
    parallel: ParallelConfig = ParallelConfig()
    lengths: tuple[PositiveInt, ...] | None = None
    """Those of the experiment's lengths that this layout is measured at; by default all."""


class ScalingConfig(Section):
    """An experiment: `klear-megatron scaling`. Each length, layout and variant makes a point."""

    run_dir: Path
    """Results, plots, and a log of each point."""
    seed: int = 0
    policy: PolicyConfig
    """What all points share; `parallel` is the layout's."""
    lengths: tuple[PositiveInt, ...] = Field(min_length=1)
    """Tokens per sequence."""
    layouts: dict[Name, LayoutConfig] = Field(min_length=1)
    variants: dict[Name, dict[str, Any]] = Field({"base": {}}, min_length=1)
    """Name -> settings of `policy` that it changes, such as `recompute_granularity: full`."""
    tokens_per_step: PositiveInt
    """Tokens of an optimizer step: as many whole sequences as fit, and at least one."""
    scaling: Literal["strong", "weak"] = "strong"
    """Whether `tokens_per_step` is of all ranks together, or of each rank."""
    steps: PositiveInt = 3
    """Steps to time, after a first one that is left out."""
    time_limit_s: PositiveFloat = 600
    """A point that takes longer is ended, and has run out of time."""
    memory_limit_gib: PositiveFloat | None = None
    """A rank whose tensors need more has run out of memory; by default, it gets what is there."""

    @model_validator(mode="after")
    def _layouts_name_lengths_that_there_are(self) -> "ScalingConfig":
        for name, layout in self.layouts.items():
            if unknown := set(layout.lengths or ()) - set(self.lengths):
                raise ValueError(f"layouts.{name}.lengths: {sorted(unknown)} are not in lengths")
        return self


@dataclass(frozen=True)
class Point:
    """One measurement."""

    length: int
    layout: str
    variant: str
    ranks: int
    sequences: int
    """Of one optimizer step."""
    policy: PolicyConfig

    @property
    def name(self) -> str:
        """The name of its files; the experiment has it once."""
        return f"{self.length}.{self.layout}.{self.variant}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence of one optimizer step."""
        return (self.length,) * self.sequences


def points(config: ScalingConfig) -> list[Point]:
    """All points, the shortest sequences first.

    Raises:
        UserError: a variant changes a setting that the policy does not have.
    """
    found = []
    for length in sorted(config.lengths):
        for name, layout in config.layouts.items():
            if layout.lengths is not None and length not in layout.lengths:
                continue
            tokens = config.tokens_per_step * (layout.ranks if config.scaling == "weak" else 1)
            sequences = max(1, tokens // length)
            found += [
                Point(
                    length, name, variant, layout.ranks, sequences, _policy(config, name, variant)
                )
                for variant in config.variants
            ]
    return found


def _policy(config: ScalingConfig, layout: str, variant: str) -> PolicyConfig:
    values = {
        **config.policy.model_dump(),
        **config.variants[variant],
        "parallel": config.layouts[layout].parallel,
    }
    return validate(PolicyConfig, values, f"variants.{variant}, layouts.{layout}:")
