"""Stands a process at any rank of any layout, and answers for a GPU that is not there."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.utils import _get_device_compute_capability

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.platform import cpu
from klear_megatron.policy.build import transformer_config
from klear_megatron.policy.config import ParallelConfig, PolicyConfig
from klear_megatron.policy.kernels import Installed, Kernels, choose_kernels
from klear_megatron.policy.parallel import initialize_model_parallel
from tests.models import tiny

HOPPER, BLACKWELL = (
    Installed(capability, transformer_engine=True, apex=False) for capability in ((9, 0), (10, 0))
)

RECIPES = [
    (fp8, gather)
    for fp8 in (None, "delayed", "tensorwise", "blockwise", "mxfp8")
    for gather in ([False, True] if fp8 else [False])
]
"""(`fp8`, `fp8_param_gather`)"""


def recipe_name(fp8: str | None, gather: bool) -> str:
    """An entry of `RECIPES` in words."""
    return f"{fp8 or 'bfloat16'}{' with FP8 weights' if gather else ''}"


# FP8 needs matrices with sides that are multiples of 16 on every rank, its blocks of 128.
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
CONFIGS = {
    "Qwen2ForCausalLM": tiny.qwen2(**_SIZES),
    "Qwen2ForCausalLM, tied embeddings": tiny.qwen2(**_SIZES, tie_word_embeddings=True),
    "Qwen3ForCausalLM": tiny.qwen3(**_SIZES),
    "LlamaForCausalLM": tiny.llama3(**_SIZES),
    "Qwen3MoeForCausalLM": tiny.qwen3_moe(**_SIZES, moe_intermediate_size=256),
}


def write_config(name: str, path: Path) -> ModelFolder:
    """The model folder of an entry of `CONFIGS`, without weights."""
    hf = CONFIGS[name]
    hf.architectures = [name.split(",")[0]]
    hf.save_pretrained(path)
    return ModelFolder(path)


def policy_config(path: Path, **settings: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"path": path, "optimizer": {"lr": 1e-4}, **settings})


def _new_group(make: Callable[..., Any], *args: Any, backend: object = None, **options: Any) -> Any:
    return make(*args, backend="fake", **options)


@contextlib.contextmanager
def standing_at(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[None]:
    """This process is one rank of a layout. There are no others: collectives change nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # Megatron-Core makes some of its groups over gloo.
    new_group = functools.partial(_new_group, dist.new_group)
    try:
        with mock.patch.object(dist, "new_group", new_group):
            initialize_model_parallel(parallel, 0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def standing_alone() -> Iterator[None]:
    """This process is a world of its own, with collectives that work."""
    initialize_model_parallel(ParallelConfig(), 0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def as_if_on(capability: tuple[int, int]) -> Iterator[None]:
    """Transformer Engine makes its modules only where torch says that there is a GPU."""
    cpu.install()
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=132, name="GPU")
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
    }
    _get_device_compute_capability.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.callback(_get_device_compute_capability.cache_clear)
        for answered in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            stack.enter_context(mock.patch.object(quantization, answered, None))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


def gpu_kernels(config: PolicyConfig, folder: ModelFolder) -> tuple[Kernels, tuple[int, int]]:
    """What is chosen on a GPU that has the recipe, and the GPU's compute capability."""
    gpu = BLACKWELL if config.fp8 == "mxfp8" else HOPPER
    assert gpu.compute_capability is not None
    return choose_kernels(config, gpu, experts=folder.num_experts > 0), gpu.compute_capability


def gpu_chunks(
    config: PolicyConfig, folder: ModelFolder, *, device: str = "meta"
) -> list[LanguageModel]:
    """This rank's chunks, of Transformer Engine's layers."""
    kernels, capability = gpu_kernels(config, folder)
    if device == "cpu":
        # To be kept in FP8, the weights would have to be rounded, which needs a kernel.
        kernels.transformer["fp8_param"] = False
    assert kernels.transformer["transformer_impl"] == "transformer_engine"
    with as_if_on(capability):
        return _chunks(config, folder, kernels, meta=device == "meta")


def torch_chunks(config: PolicyConfig, folder: ModelFolder) -> list[LanguageModel]:
    """This rank's chunks, of plain torch."""
    installed = Installed(None, transformer_engine=False, apex=False)
    kernels = choose_kernels(config, installed, experts=folder.num_experts > 0)
    return _chunks(config, folder, kernels, meta=False)


def _chunks(
    config: PolicyConfig, folder: ModelFolder, kernels: Kernels, *, meta: bool
) -> list[LanguageModel]:
    megatron = transformer_config(config, folder, kernels)
    megatron.init_model_with_meta_device = meta
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual else [None]
    return [LanguageModel(megatron, folder.config, vp_stage=stage) for stage in stages]
