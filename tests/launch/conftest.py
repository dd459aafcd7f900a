"""One real Slurm of four virtual nodes for all tests here."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT

LOCAL_SLURM = str(ROOT / "tools" / "local_slurm")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """Its folder. Stopped at the end, whatever the tests did."""
    # Not pytest's own folder: the paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            subprocess.run([LOCAL_SLURM, "up", folder, "4", "8", "8"], check=True, timeout=120)
            yield Path(folder)
        finally:
            subprocess.run([LOCAL_SLURM, "down", folder], check=True, timeout=60)


@pytest.fixture
def slurm_conf(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets Slurm's commands talk to it."""
    path = slurm / "slurm.conf"
    monkeypatch.setenv("SLURM_CONF", str(path))
    return path
