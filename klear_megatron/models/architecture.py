"""What the package needs to know about a model architecture, and the registry of architectures.

Importing it imports neither torch nor transformers, so that a run can be planned in a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from klear_megatron.errors import UserError
from klear_megatron.models.mapping import ParamMapping

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Weight:
    """One row of an architecture's table: Megatron name <-> Hugging Face tensors <-> mapping."""

    name: str
    """Name in Megatron's distributed checkpoints (Transformer Engine's spelling), plus the numbers
    of layer and expert, which checkpoints stack into one tensor."""
    sources: dict[str, tuple[int, ...]]
    """Hugging Face name -> shape, in the order that `mapping.merge` expects."""
    mapping: ParamMapping
    expert: bool = False
    """Whether it is an expert's: held by one expert-parallel rank, cut over expert-tensor ranks."""


class Architecture(Protocol):
    """Everything architecture-specific, derived from the Hugging Face config and nothing else."""

    def transformer_config(self, hf: PretrainedConfig) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig that the architecture fixes; `activation_func` by
        its name in `torch.nn.functional`."""

    def weights(self, hf: PretrainedConfig, padded_vocab_size: int) -> Iterator[Weight]:
        """The table of all weights, each stated once, in a fixed order."""

    def rotary(self, hf: PretrainedConfig) -> tuple[Tensor, float]:
        """Inverse frequencies [head_dim / 2] float32, and the factor on cos and sin (YaRN's)."""


_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(name: str, architecture: Architecture) -> None:
    """Makes `architecture` known for configs whose `architectures` list says `name`."""
    _ARCHITECTURES[name] = architecture


def get_architecture(hf: PretrainedConfig) -> Architecture:
    """The architecture a Hugging Face config names.

    Raises:
        UserError: it names none, one that is not registered, or one of another `model_type`, by
            which transformers and SGLang choose the model.
    """
    name = (hf.architectures or ["(none)"])[0]
    if name not in _ARCHITECTURES:
        raise UserError(
            f"{hf.name_or_path or 'config.json'}: unknown architecture {name!r}; known: "
            f"{', '.join(sorted(_ARCHITECTURES))}. Register your own with "
            "klear_megatron.models.register_architecture, in a module that policy.imports names."
        )
    if name.lower() == hf.model_type.replace("_", "") + "forcausallm":
        return _ARCHITECTURES[name]  # transformers, which takes seconds to import, says the same
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf.model_type)
    # A user's own architecture may have a model_type that transformers knows.
    if by_type != name and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UserError(
            f"{hf.name_or_path or 'config.json'}: architectures says {name}, but model_type "
            f"{hf.model_type!r} stands for {by_type}; correct the wrong one"
        )
    return _ARCHITECTURES[name]


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Vocabulary rounded up so that every tensor-parallel rank gets the same number of rows."""
    multiple = math.lcm(128, tensor_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple
