"""Megatron's model on a converted checkpoint against transformers' on the original."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from klear_megatron import platform
from klear_megatron.conversion.megatron_reader import is_megatron_checkpoint
from klear_megatron.errors import UserError
from klear_megatron.models.hf_checkpoint import read_config
from klear_megatron.models.language_model import LanguageModel, packed_sequences
from klear_megatron.policy.build import build_model_chunks
from klear_megatron.policy.checkpoint import load_weights
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.kernels import Installed, choose_kernels
from klear_megatron.policy.parallel import initialize_model_parallel

TOLERANCE = 1e-5
"""On the relative difference in float32."""
_LENGTHS = (1, 7, 32, 100)


@torch.no_grad()
def logits_difference(a: Path, b: Path, *, seed: int = 0) -> float:
    """Largest difference on random prompts, over the largest logit; both models in float32.

    In one process, with whole models in memory.

    Args:
        a, b: a Megatron checkpoint and a Hugging Face folder, in either order.

    Raises:
        UserError: they are not one of each.
    """
    kinds = {is_megatron_checkpoint(path): path for path in (a, b)}
    if len(kinds) < 2:
        raise UserError(f"{a}, {b}: logits are compared of one Megatron and one Hugging Face model")
    megatron, hf = kinds[True], kinds[False]
    model, vocab_size = _megatron_model(megatron, hf)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(vocab_size, (n,), generator=generator) for n in _LENGTHS]
    ours = torch.cat([_logits(model, prompt)[:, :vocab_size] for prompt in prompts])
    del model
    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    theirs = torch.cat([reference(prompt[None]).logits[0] for prompt in prompts])
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _megatron_model(megatron: Path, hf: Path) -> tuple[LanguageModel, int]:
    """The model with the checkpoint's weights, and the size of its vocabulary."""
    config = PolicyConfig.model_validate(
        {"path": hf, "dtype": "float32", "optimizer": {"lr": 1e-6}}  # never used
    )
    hf_config = read_config(hf)
    platform.init_distributed()
    initialize_model_parallel(config.parallel, seed=0)
    kernels = choose_kernels(config, Installed.here(), experts=hasattr(hf_config, "num_experts"))
    chunks = build_model_chunks(config, hf_config, kernels, temperature=1.0)
    load_weights(megatron, chunks)
    (model,) = chunks
    return model.eval(), hf_config.vocab_size


def _logits(model: LanguageModel, prompt: Tensor) -> Tensor:
    """[tokens, padded vocabulary], on the CPU."""
    tokens = prompt.to(platform.device())
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
    packed = packed_sequences(ends, len(tokens))
    positions = torch.arange(len(tokens), device=tokens.device)
    logits: Tensor = model(tokens[None], positions[None], None, packed_seq_params=packed)
    return logits[0].float().cpu()
