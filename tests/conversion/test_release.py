"""A released folder, which transformers and a real SGLang server answer from alike."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from klear_megatron.conversion import hf_to_megatron
from klear_megatron.conversion.release import release
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import read_tokenizer
from tests.conversion.folders import same_weights, weights_of
from tests.models import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run, with its config and metrics."""
    folder = tmp_path_factory.mktemp("release")
    hf = tiny.write(folder / "base", tiny.qwen3(num_hidden_layers=2))
    words = {"[UNK]": 0, "[END]": 1} | {f"w{i}": i for i in range(2, tiny.VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(hf)
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    config = {
        "run_dir": "/home/somebody/run",
        "policy": {"path": "/home/somebody/base", "optimizer": {"lr": 3e-5}},
        "rollout": {"python": "/home/somebody/python"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "reward/mean": step / 8} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hf_to_megatron(hf, run / "checkpoints" / "step_00000002")
    return run / "checkpoints" / "step_00000002"


def test_release_is_complete_and_answers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Klear-Tiny"
    release(checkpoint, out, licence="apache-2.0", yarn=True)
    assert same_weights(weights_of(out), weights_of(checkpoint.parents[2] / "base"))
    sums = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out)
    assert sums.returncode == 0
    listed = {line.split()[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {file.name for file in out.iterdir()} - {"SHA256SUMS"}

    model = tiny.load(out)
    rope: dict[str, Any] = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("yarn", 2.5, 5000.0)
    assert rope["original_max_position_embeddings"] == 32768
    assert model.config.max_position_embeddings == 81920
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.6, 0.95)

    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "| reward/mean | 0.25 |" in card
    assert "lr: 3.0e-05" in card
    assert "somebody" not in card

    # What SGLang answered, token by token, is what transformers generates.
    tokenizer = read_tokenizer(out)
    answers = [
        line.split(" -> ")[1] for line in capsys.readouterr().out.splitlines() if "->" in line
    ]
    assert len(answers) == 3
    prompt = tokenizer("12 + 30 =", return_tensors="pt").input_ids
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=32, eos_token_id=1)
    assert answers[0] == repr(tokenizer.decode(tokens[0, prompt.shape[1] :]))


def test_model_without_a_tokenizer_is_not_released(checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "step_00000002")
    for file in (broken / "hf").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        release(broken, tmp_path / "out", licence="apache-2.0")
    assert not (tmp_path / "out").exists()
