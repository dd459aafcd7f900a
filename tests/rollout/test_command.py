"""The command line of a server, on a CPU and on GPUs."""

from pathlib import Path

import pytest

from klear_megatron.rollout import RolloutConfig
from klear_megatron.rollout.servers import server_command, server_environment


def options(config: RolloutConfig, **arguments) -> dict[str, str]:
    words = server_command(config, Path("model"), 30000, **arguments)[3:]
    return {
        word.removeprefix("--"): following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.startswith("--")
    }


def test_on_gpus_each_server_has_its_own(monkeypatch):
    monkeypatch.setattr("klear_megatron.rollout.servers.HAS_GPU", True)
    config = RolloutConfig(num_servers=3, tensor_parallel_size=2, base_gpu_id=1)
    servers = [options(config, index=index, seed=5) for index in range(3)]
    assert [server["base-gpu-id"] for server in servers] == ["1", "3", "5"]
    assert {server["tp-size"] for server in servers} == {"2"}
    assert len({server["random-seed"] for server in servers}) == 3
    assert "device" not in servers[0]
    assert "PYTHONPATH" not in server_environment()


def test_on_a_cpu_nothing_needs_cuda():
    assert options(RolloutConfig())["device"] == "cpu"
    assert options(RolloutConfig())["attention-backend"] == "torch_native"
    assert server_environment()["SGLANG_USE_CPU_ENGINE"] == "1"


def test_loopback_and_users_arguments_by_default(monkeypatch):
    config = RolloutConfig(extra_args=["--log-level", "debug"], context_length=4096)
    assert options(config)["host"] == "127.0.0.1"
    assert options(config)["log-level"] == "debug"
    assert options(config)["context-length"] == "4096"


@pytest.mark.parametrize("name", ["RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"])
def test_servers_are_not_ranks_of_the_trainer(monkeypatch, name):
    monkeypatch.setenv(name, "poison")
    assert server_environment().get(name) != "poison"
