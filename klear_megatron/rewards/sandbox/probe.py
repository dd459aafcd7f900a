"""Run by an interpreter, prints what a sandbox needs to know about it, as JSON.

    executable, prefix, search_path
    names        for each name that programs may use without importing it, where it is from

The names are those that LiveCodeBench's runner imports before a program, `from module import *` for
each of _MODULES in this order and then the modules themselves, and a few more that other graders
import.
"""

import importlib
import importlib.util
import json
import os
import sys

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
    "statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_MORE = {
    "Fraction": "fractions.Fraction",
    "Decimal": "decimal.Decimal",
    "dataclass": "dataclasses.dataclass",
    "field": "dataclasses.field",
    "os": "os",
}
_IF_INSTALLED = {"np": "numpy", "pd": "pandas"}


def main() -> None:
    search_path = [path for path in sys.path if os.path.isdir(path)]
    names = dict(_MORE)
    names |= {name: m for name, m in _IF_INSTALLED.items() if importlib.util.find_spec(m)}
    for module in _MODULES:
        names |= {name: f"{module}.{name}" for name in _public_names(module)}
    names |= {module: module for module in _MODULES if module not in ("builtins", "typing")}
    known = {
        "executable": os.path.realpath(sys.executable),
        "prefix": sys.base_prefix,
        "search_path": search_path,
        "names": {n: path for n, path in names.items() if path != f"builtins.{n}"},
    }
    print(json.dumps(known))


def _public_names(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    every = getattr(module, "__all__", None)
    return list(every or (name for name in vars(module) if not name.startswith("_")))


if __name__ == "__main__":
    main()
