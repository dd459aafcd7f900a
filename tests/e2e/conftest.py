"""A tiny base model and arithmetic problems, made by the quickstart's own script."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def run_command(*arguments: str, ranks: int | None = None, timeout: float = 300) -> Any:
    """`klear-megatron ARGUMENTS`, under torchrun with `ranks`, as a user would start it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = [sys.executable] if ranks is None else [*torchrun, f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, "-m", "klear_megatron", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, sft.jsonl, train.jsonl, heldout.jsonl."""
    folder = tmp_path_factory.mktemp("quickstart")
    script = ROOT / "examples" / "quickstart" / "prepare.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture
def make_config(quickstart: Path, tmp_path: Path) -> Any:
    """Writes the quickstart's config NAME with its paths moved to temporary folders."""

    def make(name: str, **changes: Any) -> Path:
        text = (ROOT / "examples" / "quickstart" / f"{name}.yaml").read_text()
        text = text.replace(f"runs/quickstart/{name}\n", f"{tmp_path}/{name}\n")
        values = yaml.safe_load(text.replace("runs/quickstart", str(quickstart)))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return make
