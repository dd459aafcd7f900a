"""Looking into checkpoint folders, with safetensors' own reader, and giving them a tokenizer."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.models import tiny


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face checkpoint."""
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    assert weights, folder
    return weights


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def save_word_tokenizer(folder: Path) -> None:
    """One whose words are w2, w3, ..., each of the token id that it names."""
    words = {"[UNK]": 0, "[END]": 1} | {f"w{i}": i for i in range(2, tiny.VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
