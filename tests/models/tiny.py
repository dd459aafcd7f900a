"""Tiny random Hugging Face checkpoints, and the results that Hugging Face computes with them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 331  # not a multiple of 128: the padding of the vocabulary takes part in every test


_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
# head_dim is not hidden_size / num_attention_heads, as in the real ones of these families
_QWEN3 = {**_COMMON, "head_dim": 16}


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**_QWEN3, **changes})


def qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**_COMMON, **changes})


def llama3(**changes: Any) -> LlamaConfig:
    """Uses Llama 3.1's RoPE scaling, with frequencies in each of its three regimes."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(**{**_COMMON, "rope_parameters": scaling, **changes})


def qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    return Qwen3MoeConfig(**{**_QWEN3, **experts, **changes})


def yarn(factor: float = 2.5, original: int = 64) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": factor,
        "original_max_position_embeddings": original,
    }


def write(path: Path, config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a random model of this config.

    The weights are large enough that predictions are far from uniform; the norms differ from one.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.08)
    model.save_pretrained(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Saves a tokenizer whose words w2, w3, ... have the token ids that they name."""
    words = {"[UNK]": 0, "[END]": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(path)


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def random_sequences(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def hf_log_probs(
    model: PreTrainedModel, sequences: list[list[int]], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all tokens: [tokens of all sequences]; 0 for first tokens."""
    rows = []
    for sequence in sequences:
        tokens = torch.tensor(sequence)
        logits = model(tokens[None]).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        log_softmax = logits.log_softmax(-1)
        log_probs = log_softmax.gather(1, tokens[1:, None])[:, 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        rows.append(torch.nn.functional.pad(torch.stack([log_probs, entropy]), (1, 0)))
    log_probs, entropy = torch.cat(rows, 1)
    return log_probs, entropy


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """The largest difference divided by the largest entry of the reference."""
    scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours - reference).abs().max() / scale)
