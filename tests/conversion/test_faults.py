"""Damaged input, a full disk or a killed process gives a clear error or a correct result."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klear_megatron.checkpoints.hf_reader import HFCheckpoint
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from klear_megatron.errors import UserError
from tests.conversion.folders import same_weights, weights_of
from tests.distributed import ranks
from tests.models import tiny

SHARD_BYTES = 200_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded `hf` folder with checksums, and the same weights as `megatron`."""
    folder = tmp_path_factory.mktemp("sound")
    tiny.write(folder / "one_file", tiny.qwen3())
    hf_to_megatron(folder / "one_file", folder / "megatron", shard_bytes=SHARD_BYTES)
    megatron_to_hf(folder / "megatron", folder / "hf", shard_bytes=SHARD_BYTES)
    return folder


def _without_checksums(source: Path, target: Path) -> Path:
    """A copy without checksums, so that faults must be detected by other checks."""
    shutil.copytree(source, target)
    (target / "SHA256SUMS").unlink()
    return target


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def _edit_json(file: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def _set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _edit_json(folder / "config.json", lambda config: config.update(changes))


def _set_layers(count: int) -> Callable[[Path], None]:
    return _set_config(num_hidden_layers=count, layer_types=["full_attention"] * count)


def _edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Edits the weights of the first shard."""

    def damage(folder: Path) -> None:
        file = folder / "model-00001-of-00005.safetensors"
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)

    return damage


def _forget_index_entry(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    _edit_json(index, lambda content: content["weight_map"].pop("model.norm.weight"))


def _store_twice(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    name = "model.embed_tokens.weight"
    save_file({**load_file(shards[1]), name: load_file(shards[0])[name]}, shards[1])


def _only_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


SECOND = "model-00002-of-00005.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HF_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda f: _truncate(f / SECOND), rf"{SECOND}.*truncated"),
    "missing shard": (lambda f: (f / SECOND).unlink(), rf"{SECOND}.*missing"),
    "missing index entry": (_forget_index_entry, r"index\.json.*model\.norm\.weight"),
    "stored twice": (_store_twice, rf"{EMBEDDING} is in .*00001.* and .*00002"),
    "a layer too few": (_set_layers(5), r"missing.*model\.layers\.4\."),
    "a layer too many": (_set_layers(3), r"not in the model.*model\.layers\.3\."),
    "wrong head count": (_set_config(num_attention_heads=4), r"another shape.*q_proj.*\(128, 64\)"),
    "wrong group count": (_set_config(num_key_value_heads=2), r"another shape.*k_proj.*\(64, 64\)"),
    "model of another type": (_set_config(model_type="llama"), "Qwen3ForCausalLM, .* 'llama'"),
    "wrong vocabulary": (_set_config(vocab_size=330), r"another shape.*embed_tokens.*\(331, 64\)"),
    "NaN": (
        _edit_weights(lambda weights: weights[EMBEDDING][-1, -1].fill_(torch.nan)),
        rf"{EMBEDDING} .*NaN or infinite",
    ),
    "infinity": (
        _edit_weights(lambda weights: weights[EMBEDDING][0, 0].fill_(-torch.inf)),
        rf"{EMBEDDING} .*NaN or infinite",
    ),
    "integers": (
        _edit_weights(lambda weights: weights.update({EMBEDDING: weights[EMBEDDING].int()})),
        rf"not of a floating-point dtype: {EMBEDDING}",
    ),
    "garbage for checksums": (
        lambda f: (f / "SHA256SUMS").write_text("garbage\n"),
        r"SHA256SUMS: line 1 is not a checksum",
    ),
    "only pickled weights": (_only_pickle, r"pickled \.bin weights are not loaded"),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_damaged_hugging_face_folder_is_refused(fault: str, sound: Path, tmp_path: Path) -> None:
    damage, message = HF_FAULTS[fault]
    hf = _without_checksums(sound / "hf", tmp_path / "hf")
    damage(hf)
    with pytest.raises(UserError, match=f"(?s){message}"):
        hf_to_megatron(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEGATRON_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: _truncate(f / "__1_0.distcp"), r"__1_0\.distcp.*truncated"),
    "missing": (lambda f: (f / "__1_0.distcp").unlink(), r"__1_0\.distcp.*missing"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), r"\.metadata.*missing"),
    "cut metadata": (lambda f: _truncate(f / ".metadata"), r"\.metadata.*corrupt"),
    "a layer too few": (
        lambda f: _set_layers(5)(f / "hf"),
        "4 layers in the checkpoint, 5 by the config",
    ),
    "a layer too many": (
        lambda f: _set_layers(3)(f / "hf"),
        "4 layers in the checkpoint, 3 by the config",
    ),
    "more vocabulary than rows": (
        lambda f: _set_config(vocab_size=400)(f / "hf"),
        "has 384 rows, fewer than .* vocab_size, 400",
    ),
    "wrong head count": (
        lambda f: _set_config(num_attention_heads=4)(f / "hf"),
        r"linear_proj.weight: \(64, 128\) in the checkpoint, \(64, 64\) by the config",
    ),
}


@pytest.mark.parametrize("fault", MEGATRON_FAULTS)
def test_damaged_megatron_checkpoint_is_refused(fault: str, sound: Path, tmp_path: Path) -> None:
    damage, message = MEGATRON_FAULTS[fault]
    megatron = _without_checksums(sound / "megatron", tmp_path / "megatron")
    damage(megatron)
    with pytest.raises(UserError, match=message):
        megatron_to_hf(megatron, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _RunsCode:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def test_code_in_the_metadata_does_not_run(sound: Path, tmp_path: Path) -> None:
    megatron = _without_checksums(sound / "megatron", tmp_path / "megatron")
    (megatron / ".metadata").write_bytes(pickle.dumps(_RunsCode(tmp_path / "it_ran")))
    with pytest.raises(UserError, match=r"\.metadata.*refused to load posix\.mkdir"):
        megatron_to_hf(megatron, tmp_path / "out")
    assert not (tmp_path / "it_ran").exists()


def test_values_that_the_dtype_cannot_hold_are_refused(sound: Path, tmp_path: Path) -> None:
    hf = _without_checksums(sound / "hf", tmp_path / "hf")
    _edit_weights(lambda weights: weights[EMBEDDING][0, 0].fill_(1e5))(hf)
    with pytest.raises(UserError, match=rf"{EMBEDDING}.*too large for float16"):
        hf_to_megatron(hf, tmp_path / "out", dtype="float16")


def _convert(to_hf: bool, source: Path, out: Path, *, resume: bool = False) -> None:
    convert = megatron_to_hf if to_hf else hf_to_megatron
    convert(source, out, shard_bytes=SHARD_BYTES, resume=resume)


def _convert_and_die(to_hf: bool, source: Path, out: Path, tensors: int) -> None:
    """Converts in a process that kills itself with SIGKILL after this many tensors."""
    reader: Any = MegatronCheckpoint if to_hf else HFCheckpoint
    read = reader.tensor
    calls = 0

    def tensor(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > tensors:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*args)

    reader.tensor = tensor
    torch.set_num_threads(1)
    _convert(to_hf, source, out)


@pytest.mark.parametrize("to_hf", [True, False])
def test_killed_conversion_is_resumed(to_hf: bool, sound: Path, tmp_path: Path) -> None:
    source = sound / ("megatron" if to_hf else "hf")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    context = ranks._context
    process = context.Process(target=_convert_and_die, args=(to_hf, source, out, 24))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()

    complete = {file.name: file.stat().st_ino for file in partial.iterdir() if file.is_file()}
    assert len(complete) > 1
    _truncate(partial / complete.popitem()[0])  # someone damages the file; it must be written again
    _convert(to_hf, source, out, resume=True)
    assert not partial.exists()
    assert complete.items() <= {f.name: f.stat().st_ino for f in out.iterdir()}.items()
    _convert(to_hf, source, tmp_path / "at_once")
    _assert_same_files(out, tmp_path / "at_once")


def _assert_same_files(a: Path, b: Path) -> None:
    files = [sorted(f.relative_to(x) for f in x.rglob("*") if f.is_file()) for x in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_only_the_same_conversion_is_resumed(sound: Path, tmp_path: Path) -> None:
    hf, out = shutil.copytree(sound / "hf", tmp_path / "hf"), tmp_path / "out"
    process = ranks._context.Process(target=_convert_and_die, args=(False, hf, out, 12))
    process.start()
    process.join(60)
    (hf / SECOND).touch()
    with pytest.raises(UserError, match="another input or with other options"):
        _convert(False, hf, out, resume=True)
    _convert(False, hf, out)
    with pytest.raises(UserError, match="exists already"):
        _convert(False, hf, out)


@contextlib.contextmanager
def _small_disk(path: Path, nbytes: int) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("to_hf", [True, False])
@pytest.mark.parametrize("room", [-100_000, 20_000, 45_000])
def test_full_disk_is_said_and_resumed_from(
    to_hf: bool, room: int, sound: Path, tmp_path: Path
) -> None:
    source, disk = sound / ("megatron" if to_hf else "hf"), tmp_path / "disk"
    nbytes = sum(t.nbytes for t in weights_of(sound / "hf").values())
    with _small_disk(disk, nbytes + room):
        with pytest.raises(UserError, match=r"are free on that disk|make room.*--resume"):
            _convert(to_hf, source, disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", f"remount,size={2 * nbytes}", str(disk)], check=True)
        _convert(to_hf, source, disk / "out", resume=True)
        if not to_hf:
            megatron_to_hf(disk / "out", tmp_path / "back")
        result = disk / "out" if to_hf else tmp_path / "back"
        assert same_weights(weights_of(result), weights_of(sound / "hf"))
