"""The user's own code, which settings name by its path."""

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from klear_megatron.errors import UserError, nearest


def add_imports(parser: argparse.ArgumentParser) -> None:
    """The option `--import`, of commands that read no `policy.imports`, or a run's."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="package.module or file.py to import first, such as one that registers an "
        "architecture; those that the run's config names are imported anyway",
    )


def import_module(path: str, setting: str) -> ModuleType:
    """The module that `package.module` or `some/file.py` names, in the environment or from the
    current folder.

    Args:
        setting: the config key that holds the path, for the message.

    Raises:
        UserError: there is no such module. An error inside it is raised as it is.
    """
    if os.getcwd() not in sys.path:  # an installed command does not look there by itself
        sys.path.append(os.getcwd())
    try:
        return _import_file(Path(path)) if path.endswith(".py") else importlib.import_module(path)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{setting}: cannot import {path!r}: {error}") from error


def import_object(path: str, setting: str) -> Any:
    """What `package.module:name` or `some/file.py:name` names; arguments as for `import_module`.

    Raises:
        UserError: there is no such module, or nothing of that name in it.
    """
    module, _, name = path.rpartition(":")
    if not module:
        raise UserError(f"{setting}: {path!r}: write it as package.module:name or file.py:name")
    imported = import_module(module, setting)
    if not hasattr(imported, name):
        public = [known for known in vars(imported) if not known.startswith("_")]
        raise UserError(
            f"{setting}: cannot import {path!r}: there is no {name} in {module}; "
            f"{nearest(name, public)}"
        )
    return getattr(imported, name)


def source_file(path: str) -> Path | None:
    """The file of the module in `package.module:name`, `package.module` or `some/file.py`; None if
    there is none. Importing the module says why."""
    module = path.rpartition(":")[0] or path
    if module.endswith(".py"):
        return Path(module) if Path(module).is_file() else None
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of its package
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def describe_failure(path: str, error: Exception) -> str:
    """What the function that `path` names has raised, and the last line of its file that led there,
    or else the line that raised it."""
    file, frames = source_file(path), traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if file is not None and Path(one.filename) == file.resolve()]
    last = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
