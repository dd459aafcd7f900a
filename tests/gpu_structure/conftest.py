"""Tests of what a GPU would be given, on a machine without one. `make test-gpu-structure` makes the
environment for them: torch for CUDA, Transformer Engine, and Megatron-Core as on GPU hosts."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

if importlib.util.find_spec("transformer_engine") is None or torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

NEEDS_A_KERNEL = [
    "rounding weights to FP8, as loading and every optimizer step do",
    "reading MXFP8 weights back, for the push and for checkpoints",
    "any forward or backward pass: attention, matrix products, norms, expert routing",
    "a step of the fused Adam, and of the optimizer that is offloaded to the host",
    "NCCL: the collectives of training, and the push of weights to a server",
    "SGLang's start on a GPU: only its reading of the command line is tested",
]

_proven: dict[str, list[str]] = {}


@pytest.fixture
def proven() -> Callable[[str, str], None]:
    """Takes what a test has proven, and of which case; printed at the end."""
    return lambda what, case: _proven.setdefault(what, []).append(case)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _proven:
        return
    terminalreporter.section("proven without a GPU")
    for what, cases in _proven.items():
        terminalreporter.line(f"+ {what}: {', '.join(cases)}")
    terminalreporter.section("not proven here: it needs a kernel")
    for line in NEEDS_A_KERNEL:
        terminalreporter.line(f"- {line}")
