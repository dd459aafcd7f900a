"""A run says what is planned for it, refuses what cannot fit, and says what it measured."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from klear_megatron.config import Section, load_config
from klear_megatron.errors import UserError
from klear_megatron.planning import read_hardware
from klear_megatron.platform.device import init_distributed
from klear_megatron.rl.config import RLConfig
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training import planned
from tests.distributed.ranks import run_ranks
from tests.models import tiny

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def _said(path: Path, cls: type[Section], name: str, memory: float, *settings: str) -> str:
    """What a run on GPUs of so many bytes says about two steps of training."""
    init_distributed()
    overrides = ["--policy.path", str(path), "--policy.dtype", "bfloat16", *settings]
    overrides += ["--run_dir", str(path)]
    config: Any = load_config(cls, QUICKSTART / name, overrides)
    gpu = read_hardware("h100").model_copy(update={"memory": memory})
    out = io.StringIO()
    with (
        mock.patch.object(planned, "hardware_here", return_value=gpu),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            steps = planned.PlannedSteps(config)
        except UserError as error:
            return f"refused: {error}"
        for step in (46, 47):
            steps.observe(step, [10, 20, 30], 2, 1.5, 0.25)
    return out.getvalue()


@pytest.mark.parametrize(("cls", "name"), [(SFTConfig, "sft.yaml"), (RLConfig, "rl.yaml")])
def test_a_run_is_refused_with_the_arithmetic_unless_told_otherwise(cls, name, tmp_path):
    path = tiny.write(tmp_path / "model", tiny.qwen3())
    (fits,) = run_ranks(1, _said, path, cls, name, 80e9)
    assert "planned: recompute none" in fits
    assert "step 47: planned" in fits
    assert "measured 1.50 s" in fits
    record = json.loads((path / "plan.json").read_text())
    assert record["plan"]["fits"]
    (step,) = record["steps"]
    assert step["measured"] == {"seconds": 1.5, "gib": 0.25}
    assert f"planned {step['planned']['seconds']:.2f} s of training and" in fits
    (refused,) = run_ranks(1, _said, path, cls, name, 4e9)
    assert refused.startswith("refused: policy: it does not fit: weights 0.00 + gradients 0.00")
    assert "GiB, of 3.73 GiB:" in refused
    (told,) = run_ranks(1, _said, path, cls, name, 4e9, "--start_without_room", "true")
    assert "measured 1.50 s" in told
