"""Paths in a config."""

from pathlib import Path

import pytest

from klear_megatron.config import load_config
from klear_megatron.data import ConversationsConfig
from klear_megatron.errors import UserError


def load(tmp_path: Path, path: str) -> ConversationsConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"path: {path}\nsplit: ${{MINE}}\n")
    return load_config(ConversationsConfig, file)


def test_home_and_variables_are_expanded_in_paths_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MINE", "/data")
    config = load(tmp_path, "[~/a.jsonl, '${MINE}/b.jsonl', c~.jsonl]")
    assert config.path == (Path("/home/me/a.jsonl"), Path("/data/b.jsonl"), Path("c~.jsonl"))
    assert config.split == "${MINE}"


def test_variable_that_is_not_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("MINE", raising=False)
    with pytest.raises(UserError, match=r"path: the environment variable MINE is not set"):
        load(tmp_path, "'${MINE}/b.jsonl'")
