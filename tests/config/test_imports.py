"""Code of the user's own, named by its path."""

import sys
from pathlib import Path

import pytest

from klear_megatron.config.imports import import_object, source_file
from klear_megatron.conversion.command import checkpoint_in
from klear_megatron.errors import UserError
from klear_megatron.policy.config import ModelConfig
from klear_megatron.rewards import CustomRewardConfig, RewardConfig


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_loss.py").write_text("def f(): return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert import_object("my_own_loss:f", "loss.name")() == 3
    assert import_object("my_own_loss.py:f", "loss.name")() == 3


def test_a_single_name_needs_no_brackets():
    assert ModelConfig(path=Path("base"), imports="mine.py").imports == ("mine.py",)
    one = CustomRewardConfig(function="mine.py:f")
    assert RewardConfig.model_validate({"custom": "mine.py:f"}).custom == (one,)
    assert RewardConfig.model_validate({"custom": {"function": "mine.py:f"}}).custom == (one,)
    assert CustomRewardConfig(function="mine.py:f", data_sources="math").data_sources == ("math",)


def test_commands_import_what_the_run_of_a_checkpoint_did(tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    (tmp_path / "config.yaml").write_text(f"policy: {{imports: ['{tmp_path}/mine.py']}}\n")
    assert checkpoint_in(tmp_path) == tmp_path
    assert (tmp_path / "imported").exists()
    with pytest.raises(UserError, match="--import: cannot import 'nowhere'"):
        checkpoint_in(tmp_path, ["nowhere"])


def test_the_files_of_named_code_are_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text("def f(): return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_file("my_own_reward.py:f") == Path("my_own_reward.py")
    assert source_file("my_own_reward:f") == tmp_path / "my_own_reward.py"
    for without in ("sys", "nowhere.py:f", "nowhere.module:f"):
        assert source_file(without) is None
