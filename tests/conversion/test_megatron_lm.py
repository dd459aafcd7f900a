"""Folders as Megatron-LM, Megatron-Bridge and slime write them convert as they are.

Megatron-Core's own `dist_checkpointing` writes them here, in each of its layouts.
"""

import argparse
import enum
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject

from klear_megatron.checkpoints.megatron_folder import model_settings
from klear_megatron.cli import main
from klear_megatron.conversion import hf_to_megatron
from tests.conversion.folders import same_weights, weights_of
from tests.distributed.laboratory import make_learner, weights
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LAYOUTS: dict[str, dict[str, bool]] = {
    "stacked": {},
    "numbered": {"non_homogeneous_layers": True},  # experts stay stacked
    "singletons": {"singleton_local_shards": True},  # numbered experts, and halves _w and _v
}
COMMON_IS_A_FILE = hasattr(serialization, "get_default_save_common_strategy")
"""In Megatron-Core 0.16. In 0.19 the common objects are an object of the checkpoint."""
MODELS = {
    "qwen3": (tiny.qwen3(num_hidden_layers=2), {"tensor_model_parallel_size": 2}),
    "qwen2": (tiny.qwen2(num_hidden_layers=2), {"pipeline_model_parallel_size": 2}),
    "qwen3_moe": (
        tiny.qwen3_moe(num_hidden_layers=2, tie_word_embeddings=True),
        {"expert_model_parallel_size": 2},
    ),
}
SHAPES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "max_position_embeddings": 256,
    "seq_length": 128,
    "position_embedding_type": "rope",
    "rotary_base": 5000,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "vocab_size": tiny.VOCAB,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"kv_channels": 16, "qk_layernorm": True},
    "qwen2": {"kv_channels": 8, "add_qkv_bias": True},
    "qwen3_moe": {
        "kv_channels": 16,
        "qk_layernorm": True,
        "moe_ffn_hidden_size": 32,
        "moe_router_topk": 3,
    },
}


class Backend(enum.Enum):
    """An enum of theirs that the reader does not know."""

    AUTO = 5


def args_of(model: str) -> argparse.Namespace:
    """Megatron-LM's arguments of the model, among others of any kind."""
    return argparse.Namespace(
        **SHAPES,
        **OWN[model],
        num_experts=8 if model == "qwen3_moe" else None,
        moe_layer_freq=[1, 1],
        group_query_attention=True,
        norm_epsilon=1e-6,
        swiglu=True,
        untie_embeddings_and_output_weights=model != "qwen3_moe",
        params_dtype=torch.float32,
        attention_backend=Backend.AUTO,
        data_path=Path("/data"),
        world_size=2,
    )


def run_config_of(model: str) -> dict[str, Any]:
    """Bridge's run_config.yaml of the model."""
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    own = {
        "num_moe_experts": 8 if model == "qwen3_moe" else None,
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": True,
        "activation_func": silu,
        "share_embeddings_and_output_weights": model == "qwen3_moe",
    }
    target = "megatron.bridge.models.gpt_provider.GPTModelProvider"
    return {"model": {"_target_": target, **SHAPES, **OWN[model], **own}, "train": {}}


def _load_as_megatron_does(model: str, chunk: Any, folder: Path) -> None:
    """Loads our conversion with all that Megatron-Core's modules ask for, extra states too."""
    root = folder / model / "ours"
    if dist.get_rank() == 0:
        hf_to_megatron(folder / model / "hf", root, tensor_parallel_size=2, for_megatron_lm=True)
    dist.barrier()
    before = {name: tensor.clone() for name, tensor in chunk.named_parameters()}
    for tensor in chunk.parameters():
        tensor.data.fill_(torch.nan)
    wanted = {"model": chunk.sharded_state_dict()}
    assert any(key.endswith("_extra_state") for key in wanted["model"])
    chunk.load_state_dict(dist_checkpointing.load(wanted, str(root / "release"))["model"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in chunk.named_parameters())


def _write(folder: Path) -> None:
    """Writes `<model>/<layout>`: a root with a tracker, as Megatron-LM does."""
    for model, (_, parallel) in MODELS.items():
        (chunk,) = make_learner(folder / model / "hf", parallel=parallel).model.chunks
        _load_as_megatron_does(model, chunk, folder)
        for layout, metadata in LAYOUTS.items():
            root = folder / model / layout
            (root / "iter_0000007").mkdir(parents=True, exist_ok=True)
            state = {
                "model": chunk.sharded_state_dict(metadata=dict(metadata)),
                "args": args_of(model),
                "iteration": 7,
                "checkpoint_version": 3.0,
            }
            if layout == "singletons" and COMMON_IS_A_FILE:  # do as 0.19 does
                common = {key: state.pop(key) for key in list(state) if key != "model"}
                state["common_state"] = ShardedObject(
                    "common_state", common, (1,), (0,), replica_id=dist.get_rank()
                )
            dist_checkpointing.save(state, str(root / "iter_0000007"))
            (root / "latest_checkpointed_iteration.txt").write_text("7")
            if layout == "singletons":
                (root / "iter_0000007" / "common.pt").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    for model, (config, _) in MODELS.items():
        tiny.write(folder / model / "hf", config)
    run_ranks(2, _write, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_converts_with_a_config_derived_from_its_args(
    model: str, layout: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder / model / layout
    keys = dist_checkpointing.load_tensors_metadata(str(root / "iter_0000007"))
    assert any(re.search(r"layers\.\d", key) for key in keys) == (layout != "stacked")
    assert any(key.endswith("_w") for key in keys) == (layout == "singletons")
    assert main(["convert", str(root), str(tmp_path / "out")]) == 0
    assert f"{root}: its latest checkpoint is iter_0000007\n" in capsys.readouterr().out
    assert same_weights(weights_of(tmp_path / "out"), weights_of(folder / model / "hf"))
    ours, theirs = tiny.load(tmp_path / "out").config, MODELS[model][0]
    assert type(ours) is type(theirs)
    for field in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "hidden_act"):
        assert getattr(ours, field) == getattr(theirs, field)


@pytest.mark.parametrize("model", MODELS)
def test_bridge_run_config_and_release_folders(model: str, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "bridge"
    shutil.copytree(folder / model / "numbered" / "iter_0000007", root / "release")
    torch.save({"iteration": 0}, root / "release" / "common.pt")
    (root / "release" / "run_config.yaml").write_text(yaml.safe_dump(run_config_of(model)))
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    for source in (root, root / "release"):
        out = tmp_path / f"of-{source.name}"
        assert main(["convert", str(source), str(out)]) == 0
        assert same_weights(weights_of(out), weights_of(folder / model / "hf"))
    assert main(["verify", str(root), str(folder / model / "hf")]) == 0


def test_config_that_is_given_is_compared_with_the_args(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = folder / "qwen3" / "hf"
    root, out = folder / "qwen3" / "stacked", tmp_path / "out"
    assert main(["convert", str(root), str(out), "--hf", str(hf)]) == 0
    assert (out / "config.json").read_text() == (hf / "config.json").read_text()
    # The same shapes, but other positions: only the arguments can tell.
    other = tiny.qwen3(
        num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    other.architectures = ["Qwen3ForCausalLM"]
    other.save_pretrained(tmp_path / "other")
    assert main(["convert", str(root), str(out) + "2", "--hf", str(tmp_path / "other")]) == 2
    assert "rotary_base is 5000 in the checkpoint, 1000000.0 by" in capsys.readouterr().err
    assert main(["convert", str(hf), str(out) + "3", "--hf", str(hf)]) == 2
    assert "leave --hf out" in capsys.readouterr().err


def test_what_is_not_said_or_not_known_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "theirs"
    shutil.copytree(folder / "qwen3" / "stacked", root)
    common = root / "iter_0000007" / "common.pt"

    def message() -> str:
        assert main(["convert", str(root), str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    torch.save({}, common)
    assert "give the model's config with --hf" in message()
    args = args_of("qwen3")
    args.normalization = "LayerNorm"
    torch.save({"args": args}, common)
    assert "no config can be derived of normalization 'LayerNorm'" in message()
    del args.normalization, args.rotary_base
    torch.save({"args": args}, common)
    assert "its settings lack rotary_base" in message()
    common.write_bytes(common.read_bytes()[:100])
    assert "common.pt" in message()
    assert "the file is corrupt" in message()
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    assert "iter_0000008: no checkpoint" in message()
    (root / "iter_0000008" / "mp_rank_00").mkdir(parents=True)
    assert "iter_0000008: a checkpoint of format torch" in message()
    (root / "latest_checkpointed_iteration.txt").write_text("../7")
    assert "neither a number nor 'release'" in message()


@pytest.mark.parametrize("model", MODELS)
def test_a_root_for_megatron_lm_says_all_of_the_model(
    model: str, folder: Path, tmp_path: Path
) -> None:
    hf, root = folder / model / "hf", tmp_path / "root"
    options = ["--to", "megatron", "--layout", "megatron-lm", "--tp", "2"]
    assert main(["convert", str(hf), str(root), *options]) == 0
    assert sorted(path.name for path in root.iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    common = dist_checkpointing.load_common_state_dict(str(root / "release"))
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    theirs = args_of(model)
    del theirs.attention_backend, theirs.data_path, theirs.world_size, theirs.moe_layer_freq
    theirs.seq_length = 256
    assert {name: getattr(common["args"], name, None) for name in vars(theirs)} == vars(theirs)
    assert common["args"].padded_vocab_size == 384
    # Without our own copy of the config, each description of the model is enough to make it.
    shutil.rmtree(root / "release" / "hf")
    (root / "release" / "SHA256SUMS").unlink()
    for description in ("run_config.yaml", "common.pt"):
        out = tmp_path / f"by-{description}"
        assert main(["convert", str(root), str(out)]) == 0
        assert same_weights(weights_of(out), weights_of(hf))
        derived, original = (tiny.load(path).config.to_dict() for path in (out, hf))
        for config in (derived, original):
            del config["_name_or_path"]
            config.pop("head_dim", None)  # always in a derived config
        assert derived == original
        (root / "release" / description).unlink()


def test_a_run_is_a_root_for_megatron_lm(kinds: Path, tmp_path: Path) -> None:
    assert (kinds / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (kinds / "release").readlink() == Path("trained")
    common = dist_checkpointing.load_common_state_dict(str(kinds / "release"))
    assert (common["iteration"], common["checkpoint_version"]) == (1, 3.0)
    assert common["args"].no_save_optim
    assert common["args"].padded_vocab_size == 128
    assert yaml.safe_load((kinds / "release" / "run_config.yaml").read_text())["model"][
        "_target_"
    ].endswith("GPTModelProvider")
    assert main(["convert", str(kinds), str(tmp_path / "out")]) == 0
    assert same_weights(weights_of(tmp_path / "out"), weights_of(kinds / "original"))


def _train_from(folder: Path, model: str, layout: str, parallel: dict[str, int]) -> Any:
    """A learner's weights, from a root of theirs; they are padded for another vocabulary."""
    learner = make_learner(folder / model / layout, hf=folder / model / "hf", parallel=parallel)
    return weights(learner)


def test_training_starts_from_their_weights(folder: Path) -> None:
    for model, layout, parallel in [
        ("qwen3", "numbered", {}),
        ("qwen3_moe", "singletons", {"expert_model_parallel_size": 2}),
    ]:
        ours, _ = run_ranks(2, _train_from, folder, model, layout, parallel)
        assert same_weights(ours, weights_of(folder / model / "hf"))


class Witness:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_pickle_runs(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000007"
    shutil.copytree(folder / "qwen3" / "stacked" / "iter_0000007", checkpoint)
    args = args_of("qwen3")
    args.hook = Witness(tmp_path / "ran")
    torch.save({"args": args, "weights": torch.ones(3)}, checkpoint / "common.pt")
    with (
        zipfile.ZipFile(checkpoint / "common.pt") as archive,
        archive.open("common/data.pkl") as file,
        pytest.raises(pickle.UnpicklingError, match="persistent"),
    ):
        pickle.Unpickler(file).load()
    settings = model_settings(checkpoint)
    (tmp_path / "ran").rmdir()  # the plain unpickler made it; ours does not
    assert settings is not None
    assert settings["num_layers"] == 2
    assert settings["params_dtype"] is torch.float32
    assert main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "ran").exists()
