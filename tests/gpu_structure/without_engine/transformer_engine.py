"""Hides the installed Transformer Engine, from before it on PYTHONPATH. Where it is installed,
Megatron-Core's optimizer uses its kernels, and tests of the CPU path could not train."""

raise ModuleNotFoundError("hidden from tests of the CPU path")
