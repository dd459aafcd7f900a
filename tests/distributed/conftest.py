from pathlib import Path

import pytest

from tests.distributed.comparison import write_references
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and the reference for each."""
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(1, write_references, folder)
    return folder
