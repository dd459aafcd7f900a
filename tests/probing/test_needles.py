"""Samples of the needle test, and windows of positions."""

import math
import random
from typing import Any

import pytest
import torch

from klear_megatron.config import validate
from klear_megatron.errors import UserError
from klear_megatron.probing.config import NeedleConfig, PositionsConfig
from klear_megatron.probing.needles import Sample, make_sample
from klear_megatron.probing.probe import cut, losses_by_position

HAYSTACK = list(range(1000, 1100))


def encode(text: str) -> list[int]:
    """A token per character."""
    return [ord(character) for character in text]


def needle(**changes: Any) -> NeedleConfig:
    values = {"statement": "key {value}", "question": "ask", "lengths": [40], "values": ["7", "8"]}
    return validate(NeedleConfig, {**values, **changes}, "needle:")


def samples(config: NeedleConfig, length: int = 40, depth: float = 0.5) -> list[Sample]:
    rng = random.Random(0)
    return [
        make_sample(config, HAYSTACK, encode, length=length, depth=depth, rng=rng)
        for _ in range(config.samples)
    ]


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 15), (1.0, 30)])
def test_the_statement_is_at_its_depth_and_the_answer_at_the_end(depth, place):
    found = samples(needle(), depth=depth)
    assert len(found) == 8
    for sample in found:
        assert len(sample.tokens) == 40
        value = sample.tokens[-1]
        assert value in encode("78")
        assert sample.tokens[place : place + 5] == [*encode("key "), value]
        assert sample.tokens[-5:] == [*encode("ask "), value]
        assert sample.answer_tokens == 2
        hay = sample.tokens[:place] + sample.tokens[place + 5 : -5]
        assert hay == list(range(hay[0], hay[0] + 30)), "one piece of the text, whole"
    assert len({sample.tokens[-1] for sample in found}) == 2
    assert len({tuple(sample.tokens) for sample in found}) == 8


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 9, "9 tokens have no room for the statement, the question and the answer, which have"),
        ({}, 111, "has 100 tokens, but needle.lengths asks for 111"),
        ({"answer": ""}, 40, "the tokenizer joins the end of the question with the answer"),
    ],
)
def test_samples_that_cannot_be_are_refused(changes, length, message):
    with pytest.raises(UserError, match=message):
        samples(needle(**changes), length=length)


def test_losses_are_means_over_windows_without_the_first_token():
    log_probs = -torch.tensor([[99.0, 1, 2, 3, 4], [99.0, 3, 4, 5, 6]])
    assert losses_by_position(log_probs, 2) == [
        {"start": 1, "end": 3, "loss": 2.5, "perplexity": math.exp(2.5)},
        {"start": 3, "end": 5, "loss": 4.5, "perplexity": math.exp(4.5)},
    ]


def test_a_text_is_cut_into_whole_sequences():
    config = PositionsConfig(length=4, sequences=2, windows=2)
    assert cut([1, 2, 3, 4, 5, 6, 7], config) == [[1, 2, 3, 4]]
    assert len(cut(list(range(99)), config)) == 2
    with pytest.raises(UserError, match=r"has 3 tokens, but positions\.length asks for 4"):
        cut([1, 2, 3], config)
