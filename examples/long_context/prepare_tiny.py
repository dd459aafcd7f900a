"""Make what the long-context examples need on a CPU: two tiny Qwen3 models, and texts.

    python examples/long_context/prepare_tiny.py OUT_DIR

Writes, the same bytes for every call and without touching the network:

    OUT_DIR/wide/            a random model with 32,768 positions, for cpu.yaml
    OUT_DIR/base/            a random model with 256 positions, and its tokenizer, for run.sh
    OUT_DIR/256.jsonl ...    documents to train on, of 256, 2,048 and 8,192 tokens
    OUT_DIR/heldout.txt      a text of 65,536 words without any key

Words follow each other by chance, one of two after each. Somewhere in a document stands `KEY` and a
name. After that, `ASK` comes up to 24 times, and is followed by that name each time.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

WORDS, NAMES, MOST_QUESTIONS = 64, 32, 24
DOCUMENTS = {256: 9600, 2048: 800, 8192: 160}
"""Tokens -> documents of so many tokens, the first and the last token of the template included."""
SPECIAL = ["<start>", "<end>", "KEY", "ASK"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<start> "
    "{% else %}{{ message.content }} <end>{% endif %}{% endfor %}"
)


def words(rng: random.Random) -> Iterator[str]:
    word = rng.randrange(WORDS)
    while True:
        yield f"w{word}"
        word = (5 * word + rng.choice((1, 3))) % WORDS


def document(rng: random.Random, tokens: int) -> str:
    name = f"n{rng.randrange(NAMES)}"
    questions = rng.randint(1, MOST_QUESTIONS)
    places = sorted(rng.sample(range(tokens // 2), questions + 1))
    filler = words(rng)
    text = []
    for place in range(tokens // 2):
        if place in places:
            text += ["KEY" if place == places[0] else "ASK", name]
        else:
            text += [next(filler), next(filler)]
    return " ".join(text)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(WORDS)), *(f"n{i}" for i in range(NAMES))]
    level = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<start>")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<start>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def random_qwen3(vocabulary: int, positions: int, heads: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<end>"),
            pad_token_id=SPECIAL.index("<start>"),
            dtype="float32",
        )
    )


def main() -> None:
    transformers_logging.disable_progress_bar()
    out = Path(sys.argv[1])
    random_qwen3(512, 32768, heads=1).save_pretrained(out / "wide")
    tokenizer = make_tokenizer()
    random_qwen3(len(tokenizer), 256, heads=2).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    rng = random.Random(0)
    for tokens, count in DOCUMENTS.items():
        with (out / f"{tokens}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                content = document(rng, tokens - 2)
                turns = [
                    {"role": "user", "content": "write"},
                    {"role": "assistant", "content": content},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
    text = words(rng)
    (out / "heldout.txt").write_text(" ".join(next(text) for _ in range(65536)), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
