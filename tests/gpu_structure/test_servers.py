"""The command lines of servers on GPUs are understood by SGLang's own parser."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from klear_megatron.rollout import RolloutConfig
from klear_megatron.rollout.ports import Ports
from klear_megatron.rollout.servers import server_command, server_environment

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
_PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs, prepare_server_args
commands, names = json.loads(sys.argv[1])
# Abbreviations, which the parser also takes, may mean something else in another release.
ServerArgs.add_cli_args(parser := argparse.ArgumentParser())
flags = {word for command in commands for word in command if word.startswith("--")}
assert flags <= parser._option_string_actions.keys(), flags - parser._option_string_actions.keys()
parsed = [prepare_server_args(command) for command in commands]
print(json.dumps([{name: getattr(one, name) for name in names} for one in parsed]))
"""

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one GPU": ({}, {"tp_size": 1, "base_gpu_id": 4, "dtype": "bfloat16"}),
    "two servers of four GPUs": (
        {"num_servers": 2, "tensor_parallel_size": 4},
        {"tp_size": 4, "base_gpu_id": 8},
    ),
    "FP8": ({"extra_args": ["--quantization", "fp8"]}, {"quantization": "fp8"}),
    "limits": (
        {"context_length": 40960, "mem_fraction_static": 0.7, "max_running_requests": 64},
        {"context_length": 40960, "mem_fraction_static": 0.7, "max_running_requests": 64},
    ),
    **{
        f"{file.parent.name}/{file.name}": (settings, {"json_model_override_args": override})
        for file in sorted((ROOT / "examples" / "klear_reasoner_8b").glob("*.yaml"))
        if (settings := yaml.safe_load(file.read_text()).get("rollout"))
        for override in settings.get("extra_args", ["", "{}"])[1:2]
    },
}
"""Name -> (settings of `rollout`, what SGLang has to make of the last server's command line)."""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What SGLang's parser makes of the last server's command line of each case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("klear_megatron.rollout.servers.HAS_GPU", True)
        commands = []
        for settings, _ in CASES.values():
            config = RolloutConfig(**settings)
            last = config.num_servers - 1
            words = server_command(
                config, Path("model"), Ports(30000, 30001), index=last, first_gpu=4, seed=5
            )
            assert words[1:3] == ["-m", "sglang.launch_server"]
            commands.append(words[3:])
    names = {"host", "port", "nccl_port", "random_seed", "custom_weight_loader"}
    names |= {name for _, expected in CASES.values() for name in expected}
    answer = subprocess.run(
        [str(PYTHON), "-c", _PARSE, json.dumps([commands, sorted(names)])],
        capture_output=True,
        text=True,
        env=server_environment(),
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return dict(zip(CASES, json.loads(answer.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_sglang_understands_the_command_line(case, parsed, proven):
    settings, expected = CASES[case]
    expected = expected | {
        "host": settings.get("host", "127.0.0.1"),
        "port": 30000,
        "nccl_port": 30001,
        "random_seed": 5 + settings.get("num_servers", 1) - 1,
        "custom_weight_loader": ["klear_weight_loader.load"],
    }
    assert {name: parsed[case][name] for name in expected} == expected
    proven("command lines of servers that SGLang's parser understands", case)
