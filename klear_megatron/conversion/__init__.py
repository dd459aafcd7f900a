"""Converts checkpoints from and to Hugging Face: streamed, checked and never half-written."""

from typing import Any

__all__ = ["export_hf", "hf_to_megatron", "megatron_to_hf"]


def __getattr__(name: str) -> Any:
    # Late: the command line must offer the verb without waiting seconds for torch's import.
    if name in __all__:
        from klear_megatron.conversion import convert

        return getattr(convert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
