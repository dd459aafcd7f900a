"""The checks for a machine with GPUs, as far as they apply to a CPU."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from tests.distributed.ranks import run_ranks
from tools.gpu_check.__main__ import run_all
from tools.gpu_check.checks import CHECKS, Check, attention
from tools.gpu_check.outcome import NotHereError

HERE = [
    "one layer",
    "packed attention, torch",
    "train, bfloat16",
    "train, experts",
    "speed at 128 tokens, bfloat16",
]
NOT_HERE = ["train, mxfp8 weights", "memory at 128 tokens, bfloat16"]


def _run(names: list[str], folder: Path) -> dict[str, Any]:
    """Numbers of the checks, or why they do not apply; one after another in one process."""
    found = {}
    for check in (check for check in CHECKS if check.name in names):
        (folder / check.name).mkdir(parents=True, exist_ok=True)
        try:
            found[check.name] = check.run(folder / check.name)
        except NotHereError as error:
            found[check.name] = str(error)
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
    return found


def test_checks_pass_without_a_gpu_or_say_why_they_do_not_apply(tmp_path):
    (found,) = run_ranks(1, _run, HERE + NOT_HERE, tmp_path)
    assert all(isinstance(found[name], dict) for name in HERE)
    assert found["train, bfloat16"]["gradients"] > 0  # bfloat16 is not float32
    assert found["speed at 128 tokens, bfloat16"]["tokens/s"] > 0
    assert "needs Transformer Engine" in found["train, mxfp8 weights"]
    assert "no GPU to measure" in found["memory at 128 tokens, bfloat16"]


def test_what_the_set_up_leaves_out_is_no_failure(tmp_path):
    with pytest.raises(NotHereError, match="flash-attn is not installed"):
        attention(tmp_path, backend="flash-attn")


def test_context_parallel_ranks_have_the_loss_of_one(tmp_path):
    for numbers in run_ranks(2, _run, ["context parallelism, ring"], tmp_path / "ring"):
        assert numbers["context parallelism, ring"]["loss"] < 1e-3


def _unknown(folder: Path) -> dict[str, Any]:
    raise AssertionError("runs in a process that does not know it")


def test_a_failure_stops_nothing_and_what_has_passed_is_not_repeated(tmp_path, capsys):
    passing = next(check for check in CHECKS if check.name == "one layer")
    checks = [Check("unknown", _unknown), passing]
    assert run_all(checks, tmp_path, time.monotonic() + 300) == 1
    failed, passed, _ = capsys.readouterr().out.splitlines()
    assert failed.startswith("failed   unknown: ended with 1; see ")
    assert passed.startswith("passed   one layer: difference 0.00")
    # No time is left: the failed one would have been repeated.
    assert run_all(checks, tmp_path, time.monotonic()) == 0
    again, kept, _ = capsys.readouterr().out.splitlines()
    assert again.startswith("no time  unknown")
    assert kept == passed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["checks"]["one layer"]["status"] == "passed"
    assert "| one layer | passed | difference 0.00" in (tmp_path / "report.md").read_text()
