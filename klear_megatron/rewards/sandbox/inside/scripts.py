"""Runs a program as a script, with the names that competition sites import for it."""

import _symtable  # `symtable` takes longer to import
import atexit
import builtins
import os
import sys
from types import CodeType, ModuleType

TYPE_CHECKING = False  # importing `typing` would take longer than a test
if TYPE_CHECKING:
    from typing import Any


def import_names(source: str, paths: dict[str, str]) -> dict[str, object]:
    """The names of `paths` that the program uses without defining them.

    They are imported before the tests start: once for all tests, and only modules that are used.

    Args:
        paths: where each name is from, as "module.name", or "module" for a module itself.
    """
    names: dict[str, object] = {}
    for name in sorted(_undefined(_symtable.symtable(source, "program.py", "exec"))):
        if name in paths:
            module, _, attribute = paths[name].rpartition(".")
            imported = __import__(module or attribute)
            names[name] = getattr(imported, attribute) if module else imported
    return names


def _undefined(module: "Any") -> set[str]:
    """The names that the program uses, or imports itself, but does not otherwise define.

    The bare symbol table keeps `split` as a name apart from `.split`, an attribute.
    """
    defined = {
        name
        for name, flags in module.symbols.items()
        if flags & _symtable.DEF_LOCAL and not flags & _symtable.DEF_IMPORT
    }
    used: set[str] = set()
    tables = [module]
    while tables:
        table = tables.pop()
        tables += table.children
        for name, flags in table.symbols.items():
            scope = flags >> _symtable.SCOPE_OFF & _symtable.SCOPE_MASK
            if scope == _symtable.GLOBAL_IMPLICIT or flags & _symtable.DEF_IMPORT:
                used.add(name)
    return used - defined


def execute(code: CodeType, module_name: str, names: dict[str, object]) -> dict[str, object]:
    # The module `site` would make these, but takes long to import.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    module = ModuleType(module_name)
    module.__dict__.update(names, __builtins__=builtins)
    sys.modules[module_name] = module
    exec(code, module.__dict__)
    return module.__dict__


def run(code: CodeType, names: dict[str, object], stdin: int, stdout: int) -> None:
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdin)
    os.close(stdout)
    execute(code, "__main__", names)
    # End as a program does, without taking the interpreter apart, which takes longer than a test.
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)
