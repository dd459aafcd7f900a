"""The files that set up a GPU host agree with each other, and with docs/gpu.md."""

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from klear_megatron.doctor.gpu import find_gpu_software
from tests.commands import ROOT

PYTHONS = ("3.12", "3.11")  # as docs/gpu.md has them in columns
INSTRUCTION = re.compile(r"(FROM|RUN|COPY|ENV|WORKDIR) +((?:.*\\\n)*.*)")


def pins(file: str, python: str) -> dict[str, str]:
    """Distribution -> the version that a file of requirements pins for this Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "requirements" / file).read_text().splitlines():
        if line.startswith("--requirement "):
            found |= pins(line.split()[1], python)
        elif line and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"python_version": python}):
                ((pin),) = one.specifier
                assert pin.operator == "==", line
                found[one.name] = pin.version
    return found


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions, each with what follows."""
    return INSTRUCTION.findall((ROOT / "Dockerfile").read_text())


def test_the_image_has_all_that_its_set_up_needs(tmp_path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    instructions = dockerfile()
    (set_up,) = [i for i, (_, rest) in enumerate(instructions) if "make setup" in rest]
    for word, rest in instructions[:set_up]:
        if word != "COPY":
            continue
        *sources, to = rest.split()
        for source in sources:
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / to)
            else:
                target = tmp_path / to / Path(source).name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target)
    # What `make` would run in this folder, of which it knows that all prerequisites are there.
    command = instructions[set_up][1].split()
    command = [*command[command.index("make") :], "--dry-run"]
    would = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert would.returncode == 0, would.stderr
    named = set(re.findall(r"\b(?:tools|requirements)/[\w./-]+", would.stdout))
    assert named >= {"requirements/gpu.txt", "requirements/rollout-gpu.txt"}
    assert [name for name in named if not (tmp_path / name).is_file()] == []


def test_the_image_has_the_python_and_the_cuda_of_the_requirements() -> None:
    instructions = dockerfile()
    packages = " ".join(rest for word, rest in instructions if "apt-get" in rest).split()
    (python,) = re.findall(r"PYTHON=python([\d.]+)", str(instructions))
    assert python == PYTHONS[0]
    assert {f"python{python}-dev", f"python{python}-venv", "make", "g++"} <= {*packages}
    (cuda,) = re.findall(r"nvidia/cuda:(\d+)\.[\w.-]+-devel", instructions[0][1])
    assert f"transformer-engine-cu{cuda}" in pins("gpu.txt", python)


@pytest.mark.parametrize("column", range(len(PYTHONS)))
def test_versions_are_those_of_the_table_in_the_docs(column: int) -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", (ROOT / "docs/gpu.md").read_text(), re.M
    )
    table = {
        what: cells[0] if cells[column] == "the same" else cells[column] for what, *cells in rows
    }
    trainer = pins("gpu.txt", PYTHONS[column])
    servers = pins("rollout-gpu.txt", PYTHONS[column])
    assert table["Megatron-Core"] == trainer["megatron-core"]
    assert table["Transformer Engine"] == trainer["transformer-engine"]
    core = table["its core library"].strip("`")
    assert trainer[core] == trainer["transformer-engine"]
    assert table["torch, in both environments"].split()[0] == trainer["torch"] == servers["torch"]
    assert table["SGLang"] == servers["sglang"] == pins("rollout-cpu.txt", "3.11")["sglang"]


def test_megatron_core_accepts_the_transformer_engine_that_is_pinned() -> None:
    software = find_gpu_software()
    (python,) = (
        one for one in PYTHONS if pins("gpu.txt", one)["megatron-core"] == software.megatron_core
    )
    assert software.engine_range.contains(
        pins("gpu.txt", python)["transformer-engine"], prereleases=True
    )
