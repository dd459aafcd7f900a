"""Tests that a Hugging Face folder loads, and answers as the policy it was made from."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.conversion.logits import Logits, megatron_logits, transformers_logits
from klear_megatron.data import encode_prompt
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.rollout import RolloutConfig, SamplingConfig
from klear_megatron.rollout.generation import generating

_PROMPTS = ("12 + 30 =", "What is the derivative of x^3?", "def is_prime(n):")
_LENGTH = 32
MARGIN = {"float32": 2**-14, "bfloat16": 2**-6}
"""Logits nearer than this part of the largest may be either's highest: 8 roundings of bfloat16, of
up to 2**-9 each, or 1000 of float32, of up to 2**-24, all in one direction."""


class Answer(NamedTuple):
    """The token ids of a prompt and of its greedy answer."""

    prompt: list[int]
    tokens: list[int]


def try_out(folder: Path, checkpoint: Path, *, log_dir: Path) -> None:
    """Checks SGLang's greedy answers against transformers' model and Megatron's.

    Each token of the answers must also be the most likely one for transformers' model of the
    folder and for Megatron's model of the checkpoint.

    Raises:
        UserError: the folder does not load, or the models disagree.
    """
    dtype = _dtype(folder)
    answers = greedy_answers(folder, log_dir=log_dir)
    check_answers(folder, answers, transformers_logits(folder, dtype), "transformers")
    policy = megatron_logits(checkpoint, folder, dtype)
    check_answers(folder, answers, policy, f"the policy in {checkpoint}")
    tokenizer = read_tokenizer(folder)
    for prompt, tokens in answers:
        print(f"{tokenizer.decode(prompt)} -> {tokenizer.decode(tokens)!r}")


def greedy_answers(folder: Path, *, log_dir: Path) -> list[Answer]:
    """SGLang's greedy answers to three prompts, asked through the chat template if there is one."""
    tokenizer = read_tokenizer(folder)
    prompts = [_encoded(tokenizer, text) for text in _PROMPTS]
    rollout = RolloutConfig(
        dtype=_dtype(folder),
        mem_fraction_static=0.5,
        max_running_requests=len(prompts),
        extra_args=["--max-total-tokens", "4096"],
    )
    greedy = SamplingConfig(temperature=0, max_response_length=_LENGTH)
    with generating(ModelFolder(folder), rollout, log_dir) as generator:
        responses = [group[0].token_ids for group in generator.generate(prompts, greedy)]
    return list(map(Answer, prompts, responses))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(text)
    return encode_prompt(tokenizer, [{"role": "user", "content": text}])


@torch.no_grad()
def check_answers(
    folder: Path, answers: Sequence[Answer], model: AbstractContextManager[Logits], whose: str
) -> None:
    """Checks that each token of the answers has the largest logit, up to rounding.

    Raises:
        UserError: a token's logit is further below the largest than rounding explains.
    """
    margin = MARGIN[_dtype(folder)]
    tokenizer = read_tokenizer(folder)
    with model as logits:
        for prompt, tokens in answers:
            rows = logits(torch.tensor(prompt + tokens))[len(prompt) - 1 : -1]
            chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            lag = ((rows.max(-1).values - chosen) / rows.abs().max(-1).values).max().item()
            if not lag <= margin:
                raise UserError(
                    f"{folder}: after {tokenizer.decode(prompt)!r} SGLang answers "
                    f"{tokenizer.decode(tokens)!r}, with a token whose logit is {lag:.2g} of the "
                    f"largest below it by {whose}; rounding explains {margin:.2g}. The folder is "
                    "not fit to be released"
                )


def _dtype(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return config.get("dtype") or config["torch_dtype"]
