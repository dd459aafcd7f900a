"""Folders of Megatron-LM, Megatron-Bridge and slime: where the weights lie, and what they say of
the model.

A root names its newest checkpoint in `latest_checkpointed_iteration.txt`. A checkpoint's settings
are `args` among its common objects (Megatron-LM, slime) or `model` in `run_config.yaml` (Bridge).
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import yaml

from klear_megatron.checkpoints.inert import read_inert
from klear_megatron.checkpoints.metadata import read_metadata
from klear_megatron.checkpoints.records import Record
from klear_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
COMMON = "common.pt"
_COMMON_RECORD = "common_state/shard_0_1"
"""In Megatron-Core 0.19, common objects are an object of the checkpoint, not a file."""
_READABLE = (
    "only Megatron-Core's torch_dist format can be read; Megatron-LM writes it with "
    "--ckpt-format torch_dist, and from others with --ckpt-convert-format torch_dist"
)
_OTHER_FORMATS = {"mp_rank_*": "torch", ".metadata": "torch_dcp or fsdp_dtensor"}


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether the folder's metadata marks it as a Megatron distributed checkpoint."""
    return (path / "metadata.json").is_file()


def check_backend(checkpoint: Path) -> None:
    """Refuses the formats of a distributed checkpoint other than `torch_dist`.

    Raises:
        UserError: it is of another format, or its metadata.json is damaged.
    """
    path = checkpoint / "metadata.json"
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error!r}; the file is corrupt") from error
    if backend != "torch_dist":
        raise UserError(f"{path}: a checkpoint of format {backend!r}; {_READABLE}")


def newest_in(root: Path) -> Path:
    """The checkpoint that the root's tracker names; the folder itself where it has no tracker.

    Raises:
        UserError: the tracker names no checkpoint, or one of a format that cannot be read.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return root
    name = tracker.read_text(errors="replace").strip()
    if name != "release" and not (name.isascii() and name.isdigit()):
        raise UserError(f"{tracker}: says {name[:40]!r}, which is neither a number nor 'release'")
    path = root / (name if name == "release" else f"iter_{int(name):07}")
    if not is_megatron_checkpoint(path):
        found = [form for glob, form in _OTHER_FORMATS.items() if any(path.glob(glob))]
        what = f"a checkpoint of format {found[0]}" if found else "no checkpoint"
        raise UserError(f"{path}: {what}, and {tracker.name} names it; {_READABLE}")
    return path.resolve() if path.is_symlink() else path


def model_settings(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its model, under the names of Megatron-LM's arguments or of
    Bridge's `model`; None where it says nothing. Nothing in it is executed.

    Raises:
        UserError: the file that says it is damaged.
    """
    run_config = checkpoint / RUN_CONFIG
    try:
        if run_config.is_file():
            settings = yaml.safe_load(run_config.read_text(encoding="utf-8"))["model"]
        else:
            settings = vars(_common(checkpoint).get("args", SimpleNamespace()))
        return dict(settings) or None
    except Exception as error:  # a damaged pickle may raise any exception
        where = RUN_CONFIG if run_config.is_file() else COMMON
        raise UserError(f"{checkpoint}/{where}: {error!r}; the file is corrupt") from error


def _common(checkpoint: Path) -> dict[str, Any]:
    """The common objects of a checkpoint, as inert data."""
    path = checkpoint / COMMON
    if path.is_file():
        with path.open("rb") as file:
            return dict(read_inert(file))
    for index, info in read_metadata(checkpoint).storage_data.items():
        if index.fqn == _COMMON_RECORD:
            with (checkpoint / info.relative_path).open("rb") as file:
                record = cast(IO[bytes], Record(file, info.offset, info.length))
                (common,) = read_inert(record)
                return dict(common)
    return {}
