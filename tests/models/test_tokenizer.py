"""Tokenizers and models that are refused, and models of the hub."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from klear_megatron.checkpoints.hub import local_model
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import name_stop_tokens, read_stop_token_ids
from tests.data.test_encoding import CHATML, make_tokenizer
from tests.models import tiny


def test_token_that_the_model_has_no_row_for_is_refused_with_its_id_and_the_vocabulary(tmp_path):
    tiny.qwen3().save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    assert len(ModelFolder(tmp_path).tokenizer) == tiny.VOCAB  # as many as there are rows

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'</tool>' has the id 332, but .*vocab_size is 331"):
        _ = ModelFolder(tmp_path).tokenizer


def test_code_of_a_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", asked.append)
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: it needs Python code .*never run"):
        ModelFolder(tmp_path)
    assert not asked


def test_name_on_the_hub_is_its_snapshot_in_the_cache_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "cache" / "models--owner--name"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    (snapshot / "config.json").touch()
    assert local_model(Path("owner/name")) == snapshot
    with pytest.raises(UserError, match="owner/other: no such folder here, and no model of that"):
        local_model(Path("owner/other"))
    (tmp_path / "runs").mkdir()
    for folder in ("runs/mistyped", "nowhere", "/no/where"):  # not names on the hub
        assert local_model(Path(folder)) == Path(folder)


def test_end_of_a_turn_ends_responses_and_is_named_for_other_programs(tmp_path):
    """As in Qwen3-8B-Base, whose files only name <|endoftext|>."""
    tokenizer = make_tokenizer(CHATML)
    out, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": out, "top_k": 5}))
    assert read_stop_token_ids(tmp_path, tokenizer) == [out, end]
    for _ in range(2):
        name_stop_tokens(tmp_path, tokenizer)
        named = json.loads((tmp_path / "generation_config.json").read_text())
        assert named == {"eos_token_id": [out, end], "top_k": 5}
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [out, end]


def test_template_without_an_end_adds_no_stop_token(tmp_path):
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", ""))
    assert read_stop_token_ids(tmp_path, tokenizer) == [tokenizer.eos_token_id]
    name_stop_tokens(tmp_path, tokenizer)
    assert not list(tmp_path.iterdir())
