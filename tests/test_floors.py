"""The house: each package imports only packages of lower floors, or of its own."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "klear_megatron"

FLOORS = [
    ["errors", "observability", "platform"],
    ["config", "models"],
    ["checkpoints", "data", "losses", "rewards"],
    ["policy", "rollout"],
    ["conversion", "evaluation", "planning"],
    ["curation", "doctor", "release", "scaling", "training"],
    ["launch", "probing", "report", "rl", "sft"],
    ["cli"],
    ["__main__"],
]
"""From the ground up. Packages of one floor do not import each other, except on the ground."""

WITHOUT_MEGATRON = {"data", "losses", "planning", "rewards"}


def part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Every module that the file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    # Code for other interpreters: it imports nothing of ours.
    apart = ("rewards/sandbox/inside/", "rollout/cpu_stand_ins/")
    return [
        file
        for file in ROOT.rglob("*.py")
        if file != ROOT / "__init__.py" and not file.relative_to(ROOT).as_posix().startswith(apart)
    ]


def test_every_package_has_a_floor():
    placed = [name for floor in FLOORS for name in floor]
    assert sorted(placed) == sorted({part(file) for file in files()})


def test_no_import_runs_up():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for file in files():
        here = part(file)
        for module in imports(file):
            package, _, rest = module.partition(".")
            there = rest.split(".")[0]
            if package != "klear_megatron" or there == here or there == "__version__":
                continue
            ground = floor_of[here] == floor_of[there] == 0
            if floor_of[there] >= floor_of[here] and not ground:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_pure_packages_need_no_ranks():
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files()
        if part(file) in WITHOUT_MEGATRON
        for module in imports(file)
        if module.startswith(("megatron", "torch.distributed"))
    ]
    assert not wrong, "\n".join(wrong)
