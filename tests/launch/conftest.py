"""One real Slurm of four virtual nodes for all tests here."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT, prepare_quickstart
from tests.launch import whole_paper

LOCAL_SLURM = str(ROOT / "tools" / "local_slurm")


def wait_for(condition: Callable[[], object], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextlib.contextmanager
def local_slurm(folder: str, *size: str) -> Iterator[None]:
    """A Slurm that ends with this process, however that ends."""
    with subprocess.Popen(
        [LOCAL_SLURM, "hold", folder, *size],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # what ends a group of processes must leave it to end the daemons
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        yield


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """Its folder."""
    # Not pytest's own folder: the paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, local_slurm(folder, "4", "8", "8"):
        yield Path(folder)


@pytest.fixture(scope="session")
def slurm_conf(slurm: Path) -> Iterator[Path]:
    """Lets Slurm's commands talk to it."""
    path = slurm / "slurm.conf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(path))
        yield path


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's tiny base model and its problems. Only to be read."""
    folder = tmp_path_factory.mktemp("quickstart")
    prepare_quickstart(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(slurm_conf: Path, quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directories of the whole paper's recipe, which is submitted."""
    return whole_paper.submit_all(tmp_path_factory.mktemp("paper"), quickstart)


@pytest.fixture(scope="session")
def beside_the_pipeline(request: pytest.FixtureRequest) -> None:
    """Has the recipe run beside tests that mostly wait, if its own test comes later."""
    if any("pipeline" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("pipeline")
