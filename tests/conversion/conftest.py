"""One model in every kind of checkpoint folder, for tests that only read them."""

from pathlib import Path

import pytest

from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny

SHARD_BYTES = 8_000


def _save(folder: Path) -> None:
    learner = make_learner(folder / "hf", parallel={"tensor_model_parallel_size": 2})
    learner.save(folder / "trained", {"step": 1})


@pytest.fixture(scope="package")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the same weights in four forms.

    `original` is written by transformers, `converted` is its conversion to Megatron, `hf` is the
    conversion back, and `trained` is a training checkpoint that two tensor-parallel ranks saved.
    All but the first have several files and checksums.
    """
    folder = tmp_path_factory.mktemp("kinds")
    config = tiny.qwen3(num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=50)
    tiny.write(folder / "original", config)
    hf_to_megatron(folder / "original", folder / "converted", shard_bytes=SHARD_BYTES)
    megatron_to_hf(folder / "converted", folder / "hf", shard_bytes=SHARD_BYTES)
    run_ranks(2, _save, folder)
    return folder
