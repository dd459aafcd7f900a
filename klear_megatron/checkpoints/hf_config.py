"""Finds and reads a Hugging Face config.json without transformers, which takes seconds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from klear_megatron.errors import UserError

_ALWAYS_NEEDED = (
    *("architectures", "model_type", "vocab_size", "tie_word_embeddings", "hidden_act"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
)
"""Fields that every architecture here reads."""
_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def find_config(path: Path) -> Path:
    """The config.json of a Hugging Face checkpoint folder.

    Raises:
        UserError: the folder does not exist or has no config.json.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; a Hugging Face checkpoint is expected")
    if not (path / "config.json").is_file():
        hint = ""
        if (path / "metadata.json").is_file() or (path / "checkpoints").is_dir():
            hint = f"; `klear-megatron convert {path} OUT` makes one of what is there"
        raise UserError(
            f"{path}: no config.json there; a Hugging Face checkpoint is expected{hint}"
        )
    return path / "config.json"


def read_sizes(path: Path) -> Any:
    """What the folder's config.json says, as attributes.

    A config that leaves out fields, or spells them as only some version of transformers does, is
    read by transformers, which knows their defaults and their other names.

    Raises:
        UserError: as `read_config`.
    """
    file = find_config(path)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        needed = (*_ALWAYS_NEEDED, *(_OF_EXPERTS if "moe" in fields["model_type"] else ()))
        if all(fields.get(name) is not None for name in needed):
            return SimpleNamespace(**{**fields, "name_or_path": str(path)})
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # transformers says what is wrong
    from klear_megatron.checkpoints.hf_reader import read_config

    return read_config(path)
