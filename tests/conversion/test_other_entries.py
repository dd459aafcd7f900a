"""Entries of a Megatron checkpoint other than weights are known by name or refused."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from klear_megatron.conversion import megatron_to_hf
from klear_megatron.errors import UserError
from tests.conversion.folders import same_weights, weights_of

LINEAR = "decoder.layers.self_attention.linear_qkv"


def _entries(checkpoint: Path) -> dict[str, Any]:
    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def _add_object(checkpoint: Path, key: str) -> None:
    """Adds a non-tensor, stored as Megatron stores the state of Transformer Engine's modules."""
    (checkpoint / "SHA256SUMS").unlink()
    metadata = FileSystemReader(checkpoint).read_metadata()
    file = checkpoint / "__9_0.distcp"
    torch.save({"scale_fwd": torch.rand(3), "recipe": "delayed"}, file)
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file.name, 0, file.stat().st_size)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def test_training_state_is_left_behind(kinds: Path, tmp_path: Path) -> None:
    keys = _entries(kinds / "trained").keys()
    assert f"{LINEAR}._extra_state/shard_0_2" in keys
    assert any(key.startswith("optimizer.") for key in keys)
    assert any(key.startswith("random_states/") for key in keys)
    megatron_to_hf(kinds / "trained", tmp_path / "out")
    assert same_weights(weights_of(tmp_path / "out"), weights_of(kinds / "original"))
    left = ("optimizer.", "random_states/")
    assert not any(key.startswith(left) for key in _entries(kinds / "converted"))


@pytest.mark.parametrize(
    "key",
    [
        f"{LINEAR}._extra_state/shard_0_2",
        "decoder.layers.mlp.experts.linear_fc1._extra_state3/shard_1_2",
        "decoder.layers.1.mlp.linear_fc2._extra_state",
        "rng_state/shard_0_1",
    ],
)
def test_states_of_modules_and_generators_are_ignored(
    key: str, kinds: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(kinds / "converted", tmp_path / "checkpoint")
    _add_object(checkpoint, key)
    megatron_to_hf(checkpoint, tmp_path / "out")
    assert same_weights(weights_of(tmp_path / "out"), weights_of(kinds / "original"))


@pytest.mark.parametrize("key", [f"{LINEAR}.amax/shard_0_2", f"{LINEAR}._extra_states", "adapter"])
def test_other_objects_are_refused(key: str, kinds: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(kinds / "converted", tmp_path / "checkpoint")
    _add_object(checkpoint, key)
    with pytest.raises(UserError, match=f"{key} is not in the model"):
        megatron_to_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
