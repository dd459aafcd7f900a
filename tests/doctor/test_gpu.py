"""Each trap of a set-up for GPUs is named, with what to do about it; a sound set-up is not."""

from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from klear_megatron.doctor.gpu import GpuSoftware, find_gpu_software

H100: dict[str, Any] = {
    "cuda": "13.0",
    "driver": "580.95.05",
    "compute_capability": (9, 0),
    "engine": "2.11.0",
    "engine_cuda": (13,),
    "engine_range": SpecifierSet(">=2.9.0a0,<2.12.0"),
    "megatron_core": "0.16.1",
    "flash_attn_range": SpecifierSet(">=2.1.1,<2.8.4"),
    "nccl": "2.29.7",
}


def problems(**changes: Any) -> list[str]:
    return GpuSoftware(**{**H100, **changes}).problems(servers_nccl="2.29.7")


def test_a_sound_host_has_no_problem():
    assert problems() == []
    assert problems(flash_attn="2.8.3") == []
    assert problems(cuda="12.9", driver="535.183.01", engine_cuda=(12,)) == []
    # A laptop: nothing is there, and nothing is missed.
    laptop = GpuSoftware(cuda=None, driver=None, compute_capability=None, engine=None)
    assert laptop.problems(servers_nccl=None) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": "575.57.08"}, "CUDA 13.0, which needs driver 580 or newer, and the driver is"),
        ({"engine_cuda": (12,)}, "`pip install transformer-engine-cu13==2.11.0`"),
        ({"engine_cuda": (12, 13)}, "core library for 12 and 13"),
        ({"engine_cuda": ()}, "core library for none"),
        ({"engine": "2.20.2"}, "Megatron-Core 0.16.1 asks for Transformer Engine"),
        ({"engine": "2.8.0"}, "Megatron-Core 0.16.1 asks for Transformer Engine"),
        ({"engine_error": "ImportError: undefined symbol"}, "cannot be used: ImportError: undefi"),
        ({"flash_attn": "2.9.0"}, "uses flash-attn <2.8.4,>=2.1.1 and ignores 2.9.0"),
        ({"compute_capability": (8, 0)}, "install flash-attn <2.8.4,>=2.1.1"),
        ({"nccl": "2.30.7"}, "NCCL 2.30.7 and the servers have 2.29.7"),
        ({"refused_recipes": {"blockwise": "CUDA >= 12.9"}}, "policy.fp8: blockwise does not run"),
    ],
)
def test_each_trap_is_named(changes, message):
    (problem,) = problems(**changes)
    assert message in problem


def test_an_a100_with_flash_attention_packs():
    assert problems(compute_capability=(8, 0), flash_attn="2.8.3") == []


def test_megatron_cores_own_range_is_read():
    found = find_gpu_software()
    if found.megatron_core.startswith("0.16."):
        assert found.engine_range.contains("2.11.0")
        assert not found.engine_range.contains("2.12.0")
    else:
        assert found.engine_range.contains("2.20.2")
