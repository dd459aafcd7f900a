"""Whether a Hugging Face folder loads and answers: transformers and SGLang on the same prompts."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from klear_megatron import platform
from klear_megatron.conversion.dtypes import DTYPES
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import read_stop_token_ids, read_tokenizer
from klear_megatron.rollout import Generator, RolloutConfig, SamplingConfig, serving

_PROMPTS = ("12 + 30 =", "What is the derivative of x^3?", "def is_prime(n):")
_LENGTH = 32
_MARGIN = {"float32": 1e-3, "bfloat16": 0.5}
"""Logits nearer than this may be either's largest: a few roundings of numbers of about 16."""


@torch.no_grad()
def try_out(folder: Path, *, log_dir: Path) -> None:
    """Lets SGLang answer greedily, and compares each token with transformers' most likely one.

    Raises:
        UserError: one of them does not load the folder, or they do not agree.
    """
    config = json.loads((folder / "config.json").read_text())
    dtype = config.get("dtype") or config["torch_dtype"]
    tokenizer = read_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in _PROMPTS]
    rollout = RolloutConfig(
        dtype=dtype,
        mem_fraction_static=0.5,
        max_running_requests=len(prompts),
        extra_args=["--max-total-tokens", "4096"],
    )
    greedy = SamplingConfig(temperature=0, max_response_length=_LENGTH)
    with serving(rollout, folder, log_dir) as urls:
        generator = Generator(
            urls,
            rollout,
            vocab_size=config["vocab_size"],
            stop_token_ids=read_stop_token_ids(folder, tokenizer),
        )
        answers = [responses[0].token_ids for responses in generator.generate(prompts, greedy)]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    torch.nn.Module.to(model, platform.device())
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer], device=model.device)
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].float().cpu()
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        lag = (logits.max(-1).values - chosen).max().item()
        if not lag <= _MARGIN[dtype]:
            raise UserError(
                f"{folder}: after {tokenizer.decode(prompt)!r} SGLang answers "
                f"{tokenizer.decode(answer)!r}, with a token whose logit is {lag:.3g} below the "
                "largest by transformers; the folder is not fit to be released"
            )
        print(f"{tokenizer.decode(prompt)} -> {tokenizer.decode(answer)!r}")
