"""The models that are checked, and what Hugging Face computes with them on the CPU."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import SFTObjective
from klear_megatron.platform.device import HAS_GPU
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import OptimizerConfig, PolicyConfig
from klear_megatron.policy.kernels import Installed, choose_kernels
from klear_megatron.policy.learner import Learner
from klear_megatron.policy.weights import HFGather, local_parameters
from tools.gpu_check.outcome import NotHereError


@dataclass(frozen=True)
class Sizes:
    """The shape of a model, and the tokens of its batch."""

    hidden: int
    layers: int
    vocabulary: int
    tokens: tuple[int, ...]
    """Of each sequence."""


SMALL = Sizes(1024, 2, 8192, (700, 200, 60, 64)) if HAS_GPU else Sizes(256, 2, 512, (50, 20, 9, 33))
"""What Hugging Face computes on a CPU in seconds."""
ONE_LAYER = replace(SMALL, layers=1)
SLICES = (
    [Sizes(4096, 4, 151_936, (tokens,)) for tokens in (4096, 32_768)]
    if HAS_GPU
    else [Sizes(256, 2, 512, (128,))]
)
"""Four layers of an 8B model, with its vocabulary, at these lengths."""


def config_of(sizes: Sizes, *, experts: bool = False) -> PretrainedConfig:
    """A Qwen3 of these sizes, with heads of 128 as in the published ones."""
    fields: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.hidden // 128,
        "num_key_value_heads": max(2, sizes.hidden // 512),
        "head_dim": 128,
        "max_position_embeddings": max(sizes.tokens) + 16,  # a server draws a token more
        "tie_word_embeddings": False,
    }
    if experts:
        fields |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": sizes.hidden,
            "norm_topk_prob": True,
        }
        return Qwen3MoeConfig(**fields)
    return Qwen3Config(**fields)


def write_model(path: Path, config: PretrainedConfig, *, seed: int = 0) -> Path:
    """A random model in bfloat16."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def random_batch(sizes: Sizes) -> Batch:
    """Sequences that train on every token."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(sizes.vocabulary, (n,), generator=generator) for n in sizes.tokens]
    return Batch.from_sequences(
        [row.tolist() for row in rows], loss_mask=[[1.0] * len(row) for row in rows]
    )


def policy(path: Path, sizes: Sizes, **settings: Any) -> PolicyConfig:
    """The settings of a check. Gradients are not clipped, so that they can be compared."""
    optimizer = OptimizerConfig(lr=1e-4, clip_grad=0.0)
    fields = {"path": path, "tokens_per_micro_batch": max(sizes.tokens), "optimizer": optimizer}
    return PolicyConfig.model_validate({**fields, **settings})


def need_recipe(config: PolicyConfig, *, experts: bool = False) -> None:
    """Raises NotHereError if the FP8 recipe of the settings does not run here."""
    for line in choose_kernels(config, Installed.here(), experts=experts).warnings:
        if line.startswith("policy.fp8"):
            raise NotHereError(line)


@dataclass(frozen=True)
class Training:
    """A training step: its loss, and the gradients by Hugging Face's names."""

    loss: float
    gradients: dict[str, Tensor]

    def difference(self, reference: "Training", kind: str) -> float:
        """The relative one of the `loss`, of the `grad_norm`, or of all `gradients` together that
        both have under the same names: Hugging Face stacks experts."""
        if kind == "loss":
            return abs(self.loss / reference.loss - 1)
        if kind == "grad_norm":
            return abs(_norm(self.gradients.values()) / _norm(reference.gradients.values()) - 1)
        names = self.gradients.keys() & reference.gradients.keys()
        apart = _norm(self.gradients[name] - reference.gradients[name] for name in names)
        return apart / _norm(reference.gradients[name] for name in names)


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def hugging_face(path: Path, batch: Batch, dtype: torch.dtype) -> Training:
    """Plain autograd on the CPU, one sequence after another."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    loss = -_log_probs(model, batch).sum() / len(batch.tokens)
    loss.backward()
    gradients = {
        name: parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Training(loss.item(), gradients)


@torch.no_grad()
def hugging_face_log_probs(path: Path, batch: Batch, dtype: torch.dtype) -> Tensor:
    """[tokens] float32, with 0 for the first token of each sequence."""
    return _log_probs(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), batch)


def _log_probs(model: Any, batch: Batch) -> Tensor:
    rows = []
    for sequence in batch.tokens.long().split(batch.lengths):
        logits = model(sequence[None]).logits[0, :-1].float()
        log_probs = logits.log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
        rows += [log_probs.new_zeros(1), log_probs]
    return torch.cat(rows)


def make_learner(config: PolicyConfig) -> Learner:
    return Learner(config, ModelFolder(config.path), total_steps=10)


def train(learner: Learner, batch: Batch) -> Training:
    """One step. Gradients are whole where there is only one rank."""
    loss = learner.train_step(batch, SFTObjective())["loss"]
    parameters: dict[str, Any] = local_parameters(learner.model.chunks)
    shards = {name: parameter.main_grad for name, parameter in parameters.items()}
    gather = HFGather({n: s.dtype for n, s in shards.items()}, learner.model.table, to_rank=0)
    gradients = {name: t.float().cpu() for name, t in gather.stream(shards.__getitem__)}
    return Training(loss, gradients)
