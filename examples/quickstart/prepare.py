"""Make everything the quickstart trains on: a tiny Qwen3 base model and arithmetic problems.

    python examples/quickstart/prepare.py OUT_DIR [--seed 0]

Writes, the same bytes for the same seed and without touching the network:

    OUT_DIR/base/           a random-weight Qwen3 in Hugging Face format (float32), its tokenizer,
                            chat template and generation config
    OUT_DIR/sft.jsonl       worked solutions, {"messages": [...]}
    OUT_DIR/train.jsonl     problems for reinforcement learning, in Klear's format
    OUT_DIR/heldout.jsonl   problems for evaluation, in Klear's format, in neither of the above

A problem is the sum of two three-digit numbers. Its solution adds them digit by digit, lowest
first, as `digit+digit+carry=sum`, inside <think>...</think>, and boxes the answer.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 11520, 4096, 256

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Not special: decoding must keep them, because the reward reads them.
ANSWER_TOKENS = ["<think>", "</think>", "\\boxed{"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Addends = tuple[int, int]


def question(addends: Addends) -> str:
    return f"What is {addends[0]}+{addends[1]}?"


def worked_solution(addends: Addends) -> str:
    a, b = addends
    carry, steps = 0, []
    for place in (1, 10, 100):
        digit_a, digit_b = a // place % 10, b // place % 10
        total = digit_a + digit_b + carry
        steps.append(f"{digit_a}+{digit_b}+{carry}={total}")
        carry = total // 10
    return f"<think>{','.join(steps)}</think>\n\\boxed{{{a + b}}}"


def distinct_problems(rng: random.Random) -> Iterator[Addends]:
    """Endless pairs of three-digit numbers; a pair never comes twice, nor does its mirror image."""
    seen = set()
    while True:
        addends = rng.randint(100, 999), rng.randint(100, 999)
        key = tuple(sorted(addends))
        if key not in seen:
            seen.add(key)
            yield addends


def sft_row(addends: Addends) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question(addends)},
            {"role": "assistant", "content": worked_solution(addends)},
        ]
    }


def klear_row(addends: Addends) -> dict[str, Any]:
    return {
        "data_source": "math_longcot_math_verify",
        "prompt": [{"role": "user", "content": question(addends)}],
        "ability": "math",
        "reward_model": {"ground_truth": str(sum(addends)), "style": "rule"},
    }


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        count = sum(1 for row in rows if file.write(json.dumps(row) + "\n"))
    print(f"wrote {path}: {count} rows", flush=True)


def train_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text survives encode and decode, with one token per digit.

    The only merges it needs are the words that every conversation repeats, and those of `texts`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = ["system", "user", "assistant", question((100, 999)), *texts]
    bpe.train_from_iterator(words, trainer)
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in ANSWER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def random_qwen3(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden_size: int = 128, layers: int = 4
) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            # With one, its embedding starts at exactly 0. A policy that samples this token then has
            # gradients 70 times as large: RMSNorm's derivative at 0 is 1/sqrt(eps) = 1000.
            pad_token_id=None,
            dtype="float32",
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def main() -> None:
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out_dir: Path = arguments.out_dir
    out_dir.mkdir(parents=True, exist_ok=True)

    problems = distinct_problems(random.Random(arguments.seed))
    heldout = [klear_row(next(problems)) for _ in range(HELDOUT_ROWS)]
    conversations = [sft_row(next(problems)) for _ in range(SFT_ROWS)]
    train = [klear_row(next(problems)) for _ in range(TRAIN_ROWS)]
    write_jsonl(out_dir / "heldout.jsonl", heldout)
    write_jsonl(out_dir / "sft.jsonl", conversations)
    write_jsonl(out_dir / "train.jsonl", train)

    tokenizer = train_tokenizer()
    model = random_qwen3(tokenizer, arguments.seed)
    tokenizer.save_pretrained(out_dir / "base")
    model.save_pretrained(out_dir / "base")
    print(
        f"wrote {out_dir / 'base'}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens",
        flush=True,
    )


if __name__ == "__main__":
    main()
