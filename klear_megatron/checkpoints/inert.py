"""Pickles from elsewhere as plain data: nothing in them is imported, called or executed.

Megatron-LM keeps its arguments in a pickle: an `argparse.Namespace` of numbers, texts, enums,
dtypes and objects of any library. Namespaces and dtypes become real ones here. Every other class
and function becomes an `Inert`, which remembers its name and does nothing.
"""

import collections
import pickle
import types
import zipfile
from typing import IO, Any

import torch


class Inert:
    """Stands for an object that was not made, and takes what the pickle would do to it."""

    qualified_name = ""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    add = append

    def __repr__(self) -> str:
        return f"<{self.qualified_name}>"


_DATA = {
    ("argparse", "Namespace"): types.SimpleNamespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


class InertUnpickler(pickle.Unpickler):
    """Makes only namespaces, collections and dtypes; everything else is `Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return _DATA.get((module, name)) or inert_class(module, name)

    def persistent_load(self, pid: Any) -> Inert:
        """A tensor's storage, which is not read."""
        return Inert(pid)


def inert_class(module: str, name: str) -> type[Inert]:
    """A class of inert objects under the name of the one that they stand for."""
    return type(name, (Inert,), {"qualified_name": f"{module}.{name}"})


def read_inert(file: IO[bytes]) -> Any:
    """What `torch.save` wrote, without its tensors.

    Raises:
        Exception: of any kind, if the file is damaged or of another format.
    """
    with zipfile.ZipFile(file) as archive:
        (name,) = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
        with archive.open(name) as pickled:
            return InertUnpickler(pickled).load()
