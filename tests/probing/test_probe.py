"""A probe of a model on two context-parallel ranks finds what Hugging Face computes on one."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.config import validate
from klear_megatron.errors import UserError
from klear_megatron.probing.config import ProbeConfig
from klear_megatron.probing.needles import make_sample
from klear_megatron.probing.probe import probe
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTH, SEQUENCES, WINDOWS = 64, 3, 4
TOKENS = [token for row in tiny.random_sequences([LENGTH * SEQUENCES]) for token in row]
NEEDLE = {
    "statement": "w5 {value}",
    "question": "w6",
    "values": ["w7", "w8"],
    "lengths": [32],
    "depths": [0.5],
    "samples": 3,
}


def encode(text: str) -> list[int]:
    return [int(word.removeprefix("w")) for word in text.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe")
    tiny.write(path / "model", tiny.qwen3())
    tiny.write_tokenizer(path / "model")
    words = [f"w{token}" for token in TOKENS if token > 1]
    (path / "text.txt").write_text(" ".join(words))
    return path


def config(folder: Path, **changes: Any) -> ProbeConfig:
    values = {
        "run_dir": folder / "run",
        "policy": {
            "path": folder / "model",
            "dtype": "float32",
            "parallel": {"context_parallel_size": 2},
        },
        "text": folder / "text.txt",
        "positions": {"length": LENGTH, "sequences": SEQUENCES, "windows": WINDOWS},
        "needle": NEEDLE,
    }
    return validate(ProbeConfig, {**values, **changes}, "probe:")


def test_losses_and_answers_are_hugging_faces(folder):
    settings = config(folder)
    run_ranks(2, probe, settings)
    found = json.loads((folder / "run" / "probe.json").read_text())
    text = encode((folder / "text.txt").read_text())
    model = tiny.load(folder / "model")
    count = len(text) // LENGTH
    with torch.no_grad():
        log_probs, _ = tiny.hf_log_probs(
            model, [text[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]
        )
        rows = log_probs.view(count, LENGTH)
        (cell,) = found["needle"]
        assert settings.needle is not None
        rng = random.Random(0)
        samples = [
            make_sample(settings.needle, text, encode, length=32, depth=0.5, rng=rng)
            for _ in range(settings.needle.samples)
        ]
        answers, _ = tiny.hf_log_probs(model, [sample.tokens for sample in samples])
    for window in found["positions"]:
        loss = -rows[:, window["start"] : window["end"]].mean().item()
        assert window["loss"] == pytest.approx(loss, rel=1e-5)
    assert [window["start"] for window in found["positions"]] == [1, 17, 32, 48]
    assert cell["probability"] == pytest.approx(answers[31::32].exp().mean().item(), rel=1e-4)
    assert cell["accuracy"] == (answers[31::32] > torch.tensor(0.5).log()).float().mean()
    assert (folder / "run" / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_beyond_the_models_positions_are_refused(folder):
    too_long = config(folder, needle={**NEEDLE, "lengths": [257]})
    with pytest.raises(UserError, match="a sequence of 257 tokens is beyond the model's max_pos"):
        probe(too_long)
