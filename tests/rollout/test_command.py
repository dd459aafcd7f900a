"""The command line of a server, on a CPU and on GPUs."""

from pathlib import Path

import pytest

from klear_megatron.errors import UserError
from klear_megatron.platform.device import ranks_on_this_host
from klear_megatron.rollout import RolloutConfig, serving
from klear_megatron.rollout.ports import Ports
from klear_megatron.rollout.servers import choose_first_gpu, server_command, server_environment


def options(config: RolloutConfig, **arguments) -> dict[str, str]:
    words = server_command(config, Path("model"), Ports(30000, 30001), **arguments)[3:]
    return {
        word.removeprefix("--"): following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.startswith("--")
    }


def test_on_gpus_each_server_has_its_own(monkeypatch):
    monkeypatch.setattr("klear_megatron.rollout.servers.HAS_GPU", True)
    config = RolloutConfig(num_servers=3, tensor_parallel_size=2)
    servers = [options(config, index=index, first_gpu=4, seed=5) for index in range(3)]
    assert [server["base-gpu-id"] for server in servers] == ["4", "6", "8"]
    assert {server["tp-size"] for server in servers} == {"2"}
    assert len({server["random-seed"] for server in servers}) == 3
    assert "device" not in servers[0]
    assert "cpu_stand_ins" not in server_environment()["PYTHONPATH"]


def test_servers_have_the_gpus_after_the_trainers(monkeypatch):
    monkeypatch.setattr("klear_megatron.rollout.servers.HAS_GPU", True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_first_gpu(RolloutConfig(), trainer_ranks=ranks_on_this_host()) == 4
    assert choose_first_gpu(RolloutConfig(base_gpu_id=6), trainer_ranks=4) == 6
    assert choose_first_gpu(RolloutConfig(), trainer_ranks=0) == 0  # an evaluation has no ranks
    with pytest.raises(UserError, match=r"rollout.base_gpu_id: GPU 3 .* GPUs 0 to 3; give 4 or"):
        choose_first_gpu(RolloutConfig(base_gpu_id=3), trainer_ranks=4)


def started_on(config: RolloutConfig, folder: Path, *, own_weights: bool) -> str:
    """The first GPU that `serving` asks for, by the command line of a stand-in for SGLang."""
    with (
        pytest.raises(UserError) as error,
        serving(config, folder, folder / "logs", own_weights=own_weights),
    ):
        pass
    words = str(error.value).split()
    return words[words.index("--base-gpu-id") + 1]


def test_a_trainers_server_does_not_start_on_the_trainers_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("klear_megatron.rollout.servers.HAS_GPU", True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = RolloutConfig(python=Path("/bin/echo"))  # prints its command line and ends
    assert started_on(config, tmp_path / "trainer", own_weights=True) == "2"
    assert started_on(config, tmp_path / "other", own_weights=False) == "0"


def test_on_a_cpu_nothing_needs_cuda_and_idle_servers_leave_the_cores_to_the_trainer():
    assert "sleep-on-idle" in options(RolloutConfig())
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
