"""Compares Megatron's model on one checkpoint with transformers' model on the other."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from klear_megatron.checkpoints.dtypes import DTYPES
from klear_megatron.checkpoints.megatron_folder import is_megatron_checkpoint
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.checkpoints.model_folder import ModelFolder, config_of
from klear_megatron.errors import UserError
from klear_megatron.models.language_model import packed_sequences
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.platform.device import this_device
from klear_megatron.policy.config import ModelConfig
from klear_megatron.policy.model import Model

TOLERANCE = 1e-5
"""On the relative difference in float32."""
_LENGTHS = (1, 7, 32, 100)

Logits = Callable[[Tensor], Tensor]
"""Tokens [n] -> logits [n, vocabulary], float32 on the CPU."""


class LogitsDifference(NamedTuple):
    """The largest difference divided by the largest logit, and the number of prompts and tokens."""

    relative: float
    prompts: int
    tokens: int


@torch.no_grad()
def logits_difference(a: Path, b: Path, texts: Sequence[str] = ()) -> LogitsDifference:
    """Compares the logits after every token of the prompts, both models in float32.

    Each model uses its own config. Runs in one process and holds one whole model at a time.

    Args:
        a, b: a Megatron checkpoint and a Hugging Face folder, in either order.
        texts: the prompts, for the folder's tokenizer; random tokens by default.

    Raises:
        UserError: `a` and `b` are of the same kind, there is no tokenizer, or a text has no tokens.
    """
    kinds = {is_megatron_checkpoint(path): path for path in (a, b)}
    if len(kinds) < 2:
        raise UserError(f"{a}, {b}: logits are compared of one Megatron and one Hugging Face model")
    megatron, hf = kinds[True], kinds[False]
    prompts = _encode(texts, hf) if texts else _random_prompts(ModelFolder(hf).config.vocab_size)
    with config_of(MegatronCheckpoint(megatron)) as folder:
        ours = _on(prompts, megatron_logits(megatron, folder.path, "float32"))
    theirs = _on(prompts, transformers_logits(hf, "float32"))
    relative = float((ours - theirs).abs().max() / theirs.abs().max())
    return LogitsDifference(relative, len(prompts), sum(map(len, prompts)))


def _random_prompts(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in _LENGTHS]


def _encode(texts: Sequence[str], hf: Path) -> list[Tensor]:
    tokenizer = read_tokenizer(hf)
    prompts = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if not len(prompt):
            raise UserError(f"prompt {text!r}: no tokens; leave it out")
    return prompts


def _on(prompts: Sequence[Tensor], model: contextlib.AbstractContextManager[Logits]) -> Tensor:
    with model as logits:
        return torch.cat([logits(prompt) for prompt in prompts])


@contextlib.contextmanager
def transformers_logits(folder: Path, dtype: str) -> Iterator[Logits]:
    """The logits of transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    torch.nn.Module.to(model, this_device())
    yield lambda tokens: model(tokens[None].to(model.device)).logits[0].float().cpu()


@contextlib.contextmanager
def megatron_logits(checkpoint: Path, hf: Path, dtype: str) -> Iterator[Logits]:
    """The logits of Megatron's model, built as for training, in a world of one process.

    Args:
        checkpoint: the weights.
        hf: the folder with the model's config.
    """
    config = ModelConfig.model_validate({"path": hf, "dtype": dtype})
    model = Model(config, ModelFolder(hf))
    model.load(checkpoint)
    (chunk,) = model.chunks
    chunk.eval()

    def logits(prompt: Tensor) -> Tensor:
        tokens = prompt.to(this_device())
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
        packed = packed_sequences(ends, len(tokens))
        positions = torch.arange(len(tokens), device=tokens.device)
        padded = chunk(tokens[None], positions[None], None, packed_seq_params=packed)
        return padded[0, :, : model.folder.config.vocab_size].float().cpu()

    try:
        yield logits
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
