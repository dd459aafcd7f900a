"""The `.metadata` of torch's distributed checkpoints: a pickle, read without running its code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from klear_megatron.checkpoints.inert import inert_class

_CHECKPOINT = "torch.distributed.checkpoint"


def read_metadata(checkpoint: Path) -> Metadata:
    """Reads which tensor lies where.

    Raises:
        Exception: of any kind, if the file is missing, damaged or not such metadata.
    """
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"a {type(metadata).__name__}, not metadata")
    return metadata


class _Unpickler(pickle.Unpickler):
    """Loads only the classes that metadata consists of; any other could run code from the file."""

    def find_class(self, module: str, name: str) -> Any:
        if module in (f"{_CHECKPOINT}.metadata", f"{_CHECKPOINT}.planner"):
            found = super().find_class(module, name)
            known = isinstance(found, type) and found.__module__ == module
        elif module == "torch":
            found = super().find_class(module, name)
            known = found is torch.Size or isinstance(found, torch.dtype)
        elif module.startswith("megatron."):
            return inert_class(module, name)  # says how it was written
        else:
            known = (module, name) in {
                (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
                ("torch.serialization", "_get_layout"),
            }
            found = super().find_class(module, name) if known else None
        if not known:
            raise pickle.UnpicklingError(f"refused to load {module}.{name} from a checkpoint")
        return found
