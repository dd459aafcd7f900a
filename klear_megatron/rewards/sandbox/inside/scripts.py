"""Running a program as a script, with the names that competition sites import for it."""

import atexit
import builtins
import os
import sys
from types import CodeType, ModuleType

# Solutions are often written for sites that import these first, as LiveCodeBench's grader does.
# A module's own name means the module.
NAMES = {
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Iterable Iterator List "
    "NamedTuple Optional Sequence Set Tuple TypeVar Union",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle "
    "groupby islice pairwise permutations product repeat starmap takewhile zip_longest",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "math": "ceil comb cos exp factorial floor gcd hypot inf isqrt lcm log log10 log2 perm pi "
    "prod sin sqrt tan",
    "operator": "add itemgetter mul xor",
    "string": "ascii_lowercase ascii_uppercase digits",
    "random": "randint shuffle",
    "copy": "deepcopy",
    "datetime": "date timedelta",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "dataclasses": "dataclass field",
    "os": "",
    "sys": "",
    "re": "",
    "json": "",
    "time": "",
    "statistics": "",
}
_MODULE_OF = {name: module for module, names in NAMES.items() for name in names.split()}


def import_names(code: CodeType) -> dict[str, object]:
    """The names of NAMES that the program mentions.

    They are imported before the tests start, so each module is imported once for all of them.
    """
    names: dict[str, object] = {}
    for name in _mentioned(code):
        if name in NAMES:
            names[name] = __import__(name)
        elif name in _MODULE_OF:
            names[name] = getattr(__import__(_MODULE_OF[name]), name)
    return names


def _mentioned(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _mentioned(constant)
    return names


def execute(code: CodeType, module_name: str, names: dict[str, object]) -> dict[str, object]:
    # What the module `site` would have made, at a cost.
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
    # The end of a program, but for taking the interpreter apart, which takes longer than a test.
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)
