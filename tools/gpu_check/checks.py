"""The checks, cheapest first."""

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.doctor.gpu import version
from klear_megatron.models.attention import PackedAttention
from klear_megatron.models.language_model import packed_sequences
from klear_megatron.platform.device import HAS_GPU, init_distributed, this_device
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.checkpoint import checkpoint_path, latest_checkpoint
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.model import Model
from klear_megatron.rollout import RolloutConfig, serving
from klear_megatron.rollout.weight_sync import WeightSync
from tools.gpu_check import models, speed
from tools.gpu_check.outcome import FailedError, NotHereError, Numbers

_NEAR = 3.0
"""Differences may be this many times as large as those of Hugging Face's bfloat16 on a CPU."""
_FP8_GRADIENT, _FP8_LOSS = 2**-3, 0.02
"""The largest relative differences in FP8. Gradients are in E5M2, with two bits of mantissa; no
GPU has confirmed these limits yet."""
_RESUMED = 1e-3
"""The largest relative difference of a resumed loss: some GPU kernels add up in any order."""
_BFLOAT16 = 1e-3
"""Differences below this are no defect, however near Hugging Face's bfloat16 is."""
_BACKENDS = {
    "cuDNN": "NVTE_FUSED_ATTN",
    "flash-attn": "NVTE_FLASH_ATTN",
    "plain": "NVTE_UNFUSED_ATTN",
}
"""Transformer Engine's attention backends, and the variables that allow them."""
_SERVED = 0.05
"""The largest mean difference between log-probabilities of trainer and server, both in bfloat16."""


@dataclass(frozen=True)
class Check:
    """One check, which is called with a folder of its own."""

    name: str
    run: Callable[[Path], Numbers]
    ranks: int = 1
    gpus: int = 1
    """How many it needs where there are any."""


def _need(numbers: Numbers, **limits: float) -> Numbers:
    """Fails if a number is above its limit."""
    for name, limit in limits.items():
        if not numbers[name] <= limit:
            raise FailedError(f"{name} is above {limit:.2g}", numbers)
    return numbers


def doctor(folder: Path) -> Numbers:
    """What `klear-megatron doctor` says."""
    from klear_megatron.doctor import examine

    if problems := examine():
        raise FailedError("; ".join(problems), {"problems": len(problems)})
    return {"problems": 0}


def one_layer(folder: Path) -> Numbers:
    """Log-probabilities of one layer in bfloat16."""
    return _log_probs_against_hugging_face(folder, models.ONE_LAYER)


def log_probs(folder: Path) -> Numbers:
    """Log-probabilities over a whole vocabulary, in chunks."""
    sizes = replace(models.ONE_LAYER, vocabulary=models.SLICES[0].vocabulary)
    return _log_probs_against_hugging_face(folder, sizes)


def _log_probs_against_hugging_face(folder: Path, sizes: models.Sizes) -> Numbers:
    path = models.write_model(folder / "hf", models.config_of(sizes))
    batch = models.random_batch(sizes)
    model = Model(models.policy(path, sizes), ModelFolder(path))
    model.load(path)
    ours, _ = model.log_probs(batch)
    expected, theirs = (
        models.hugging_face_log_probs(path, batch, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    numbers = {
        "difference": float((ours - expected).abs().mean()),
        "Hugging Face's": float((theirs - expected).abs().mean()),
    }
    return _need(numbers, difference=_NEAR * numbers["Hugging Face's"] + 1e-6)


def attention(folder: Path, *, backend: str | None) -> Numbers:
    """Packed attention and its gradients, by one backend of Transformer Engine or by torch."""
    if backend == "flash-attn" and version(backend) is None:
        raise NotHereError("flash-attn is not installed")
    sizes = models.ONE_LAYER
    path = models.write_model(folder / "hf", models.config_of(sizes))
    (chunk,) = Model(models.policy(path, sizes), ModelFolder(path)).chunks
    # Megatron-Core refuses to build a model with these set; Transformer Engine reads them later.
    if backend is not None:
        os.environ |= {name: str(int(name == _BACKENDS[backend])) for name in _BACKENDS.values()}
    core = chunk.decoder.layers[0].self_attention.core_attention
    groups = SimpleNamespace(cp=parallel_state.get_context_parallel_group())
    plain = PackedAttention(
        chunk.config, softmax_scale=chunk.config.softmax_scale, pg_collection=groups
    )
    starts = torch.tensor([0, *sizes.tokens]).cumsum(0).int().to(this_device())
    packed = packed_sequences(starts, max(sizes.tokens))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(sizes.tokens), heads, chunk.config.kv_channels, generator=generator)
        for heads in (chunk.config.num_attention_heads, *[chunk.config.num_query_groups] * 2)
    ]

    def run(module: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.bfloat16().to(this_device(), dtype).requires_grad_() for x in inputs]
        mask = {"attention_mask": None, "attn_mask_type": AttnMaskType.causal}
        output = module(*leaves, **mask, packed_seq_params=packed).flatten(1)
        gradients = torch.autograd.grad((output.float() ** 2).sum(), leaves)
        return [output.float(), *(gradient.float() for gradient in gradients)]

    expected = run(plain, torch.float32)
    numbers = {
        "difference": _distance(run(core, torch.bfloat16), expected),
        "torch's": _distance(run(plain, torch.bfloat16), expected),
    }
    return _need(numbers, difference=_NEAR * numbers["torch's"])


def _distance(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative one of any pair."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True))


def train(folder: Path, *, experts: bool = False, **settings: Any) -> Numbers:
    """A training step's loss and gradients, against Hugging Face's in float32 on the CPU."""
    init_distributed()
    sizes, path = models.SMALL, folder / "hf"
    config = models.policy(path, sizes, **settings)
    models.need_recipe(config, experts=experts)
    if dist.get_rank() == 0:
        models.write_model(path, models.config_of(sizes, experts=experts))
    dist.barrier()
    batch = models.random_batch(sizes)
    ours = models.train(models.make_learner(config), batch)
    expected, theirs = (
        models.hugging_face(path, batch, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    kinds = ("loss", "grad_norm", "gradients") if dist.get_world_size() == 1 else ("loss",)
    numbers, limits = {}, {}
    for kind in kinds:
        numbers[kind] = ours.difference(expected, kind)
        numbers[f"Hugging Face's {kind}"] = theirs.difference(expected, kind)
        least = (_FP8_LOSS if kind == "loss" else _FP8_GRADIENT) if config.fp8 else _BFLOAT16
        limits[kind] = max(_NEAR * numbers[f"Hugging Face's {kind}"], least)
    return _need(numbers, **limits)


def resume(folder: Path) -> Numbers:
    """Is killed while it writes a checkpoint, goes on from the last whole one, and has the loss
    that came next."""
    sizes = models.SMALL
    path = models.write_model(folder / "hf", models.config_of(sizes))
    config = models.policy(path, sizes, checkpoint={"asynchronous": True})
    process = get_context("spawn").Process(target=_train_until_killed, args=(config, folder))
    process.start()
    process.join()
    losses = json.loads((folder / "losses.json").read_text())
    found = latest_checkpoint(folder)
    numbers: Numbers = {"exit": process.exitcode, "losses": losses}
    if process.exitcode != -signal.SIGKILL or found is None:
        raise FailedError("it did not save and die", numbers)
    learner = models.make_learner(config)
    step = learner.load(found)["step"]
    ours = models.train(learner, models.random_batch(sizes)).loss
    numbers |= {"step": step, "difference": abs(ours / losses[step] - 1)}
    return _need(numbers, difference=_RESUMED)


def _train_until_killed(config: PolicyConfig, folder: Path) -> None:
    learner = models.make_learner(config)
    batch = models.random_batch(models.SMALL)
    losses = []
    for step in range(4):
        losses.append(models.train(learner, batch).loss)
        (folder / "losses.json").write_text(json.dumps(losses))
        if step == 1:
            learner.save(checkpoint_path(folder, 2), {"step": 2})
            learner.finish_saves()
    learner.save(checkpoint_path(folder, 4), {"step": 4})
    os.kill(os.getpid(), signal.SIGKILL)


def push(folder: Path) -> Numbers:
    """Weights go to a real server, which then has the trainer's log-probabilities."""
    sizes = models.SMALL
    config = models.config_of(sizes)
    served = models.write_model(folder / "served", config, seed=1)
    path = models.write_model(folder / "hf", config)
    model = Model(models.policy(path, sizes), ModelFolder(path))
    model.load(path)
    batch = models.random_batch(sizes)
    ours, _ = model.log_probs(batch)
    limits = ["--max-total-tokens", "20000", "--skip-tokenizer-init"]
    rollout = RolloutConfig(mem_fraction_static=0.3 if HAS_GPU else 0.05, extra_args=limits)
    with serving(rollout, served, folder / "logs", own_weights=True) as servers:
        (url,) = servers.urls
        before = _served_difference(url, batch, ours)
        with WeightSync([url], rollout, model.placed_hf_tensors) as sync:
            sync.push(model.own_hf_tensors(), version=1)
            start = time.perf_counter()
            sync.push(model.own_hf_tensors(), version=2)
            seconds = time.perf_counter() - start
        after = _served_difference(url, batch, ours)
    numbers = {"before": before, "difference": after, "push_s": seconds}
    return _need(numbers, difference=min(_SERVED, before / 2))


def _served_difference(url: str, batch: Batch, ours: Tensor) -> float:
    """The mean difference between the server's log-probabilities and the trainer's."""
    theirs = []
    for sequence in batch.tokens.split(batch.lengths):
        request = {
            "input_ids": sequence.tolist(),
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = httpx.post(f"{url}/generate", json=request, timeout=300).raise_for_status()
        rows = answer.json()["meta_info"]["input_token_logprobs"]
        theirs += [row[0] or 0.0 for row in rows]  # the first token has none
    return float((torch.tensor(theirs) - ours).abs().mean())


_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def _partial(function: Callable[..., Numbers], **settings: Any) -> Callable[[Path], Numbers]:
    return functools.partial(function, **settings)


CHECKS = [
    Check("doctor", doctor),
    Check("one layer", one_layer),
    *(
        Check(f"packed attention, {backend or 'torch'}", _partial(attention, backend=backend))
        for backend in (_BACKENDS if HAS_GPU else [None])
    ),
    Check("log-probs", log_probs),
    Check("train, bfloat16", train),
    *(Check(f"train, {recipe}", _partial(train, fp8=recipe)) for recipe in _RECIPES),
    *(
        Check(f"train, {recipe} weights", _partial(train, fp8=recipe, fp8_param_gather=True))
        for recipe in _RECIPES
    ),
    Check("train, experts", _partial(train, experts=True)),
    Check("train, experts in blockwise", _partial(train, experts=True, fp8="blockwise")),
    Check("save, kill, resume", resume),
    *(
        Check(
            f"context parallelism, {name}",
            _partial(
                train, parallel={"context_parallel_size": 2, "context_parallel_comm_type": kind}
            ),
            ranks=2,
            gpus=2,
        )
        for name, kind in (("ring", "p2p"), ("all-to-all", "a2a"))
    ),
    Check("push to a server", push, gpus=2),
    *(
        Check(
            f"{what} at {max(sizes.tokens)} tokens, {recipe or 'bfloat16'}",
            _partial(function, sizes=sizes, recipe=recipe),
        )
        for sizes in models.SLICES
        for recipe in (None, "blockwise")
        for what, function in (("memory", speed.memory), ("speed", speed.speed))
    ),
]
