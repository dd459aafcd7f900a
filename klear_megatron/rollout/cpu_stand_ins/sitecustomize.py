"""First on PYTHONPATH of an SGLang server without a GPU: lets torchvision be imported.

PyPI's torchvision is linked against CUDA, so its compiled operators cannot be loaded beside a
CPU-only torch. SGLang uses none of them for text, but importing torchvision registers shape
functions for two of them, which fails if nobody has declared that they exist.
"""

import importlib.abc
import sys
from typing import Any

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareOperatorsFirst(importlib.abc.MetaPathFinder):
    """Finds no module itself; it only sees the import of torchvision coming."""

    library: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # Kept, because a library's operators go when it does.
            _DeclareOperatorsFirst.library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                _DeclareOperatorsFirst.library.define(operator)


sys.meta_path.insert(0, _DeclareOperatorsFirst())
