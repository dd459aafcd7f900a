"""Checkpoints from and to Hugging Face: streamed, checked, and never half there."""

from typing import Any

__all__ = ["export_hf", "hf_to_megatron", "megatron_to_hf"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line can offer the verb without the seconds torch takes to import.
    if name in __all__:
        from klear_megatron.conversion import convert

        return getattr(convert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
