"""A tiny base model and arithmetic problems, made by the quickstart's own script."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import ROOT, prepare_quickstart


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, sft.jsonl, train.jsonl, heldout.jsonl."""
    folder = tmp_path_factory.mktemp("quickstart")
    prepare_quickstart(folder)
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
