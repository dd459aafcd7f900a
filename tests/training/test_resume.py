"""A run that goes on with other settings takes them, and says so, or refuses."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from klear_megatron.checkpoints.stages import Stage, read_stages
from klear_megatron.conversion import megatron_to_hf
from klear_megatron.errors import UserError
from klear_megatron.losses import SFTObjective
from klear_megatron.observability import Phases
from klear_megatron.policy.batch import Batch
from klear_megatron.sft.config import SFTConfig
from klear_megatron.sft.loop import train_sft
from klear_megatron.training import resume as resume_module
from klear_megatron.training.resume import find_checkpoint, record_config, resume
from klear_megatron.training.saver import Saver
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny

OPTIMIZER = {"lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "cosine", "weight_decay": 0.1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("resume") / "qwen3", tiny.qwen3(num_hidden_layers=2))


ROWS = [[f"w{a} w{b}", f"w{a + b}"] for a in range(2, 4) for b in range(4, 8)]
TEMPLATE = """{% for m in messages %}w9 {{ m.content }} [END] {% endfor %}
{%- if add_generation_prompt %}w9 {% endif %}"""


def _config(path: Path, run_dir: Path, **changes: Any) -> SFTConfig:
    settings = {
        "run_dir": run_dir,
        "save_every": 1,
        "batch_size": 2,
        "data": {"path": path / "none.jsonl", "max_length": 64},
        "policy": {
            "path": path,
            "dtype": "float32",
            "tokens_per_micro_batch": 64,
            "optimizer": OPTIMIZER | changes.pop("optimizer", {}),
        },
    }
    return SFTConfig.model_validate(settings | changes)


def _learner(config: SFTConfig) -> Any:
    return make_learner(config.policy.path, optimizer=config.policy.optimizer.model_dump())


def _step(learner: Any) -> dict[str, float]:
    sequences = tiny.random_sequences([9, 12])
    batch = Batch.from_sequences(sequences, loss_mask=[[1.0] * len(s) for s in sequences])
    return learner.train_step(batch, SFTObjective())


def _train_and_save(config: SFTConfig, steps: int) -> None:
    learner = _learner(config)
    saver = Saver(learner, config, 10, 0, dict)
    for step in range(1, steps + 1):
        _step(learner)
        saver.trained(step)
        saver.save_what_is_due(Phases(), None)


def _go_on(learner: Any, config: SFTConfig, last_step: int) -> dict[str, Any]:
    checkpoint = find_checkpoint(config)
    assert checkpoint is not None
    checkpoint.check_last_step(last_step)
    return resume(learner, config, checkpoint)


def _resume(config: SFTConfig) -> tuple[dict[str, Any], str, Any]:
    learner = _learner(config)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        state = _go_on(learner, config, 10)
    record_config(config, state["step"] + 1)
    return state, said.getvalue(), learner


def _change_the_schedule(path: Path, run_dir: Path) -> Any:
    _train_and_save(_config(path, run_dir), 2)
    changed = {"lr": 4e-4, "min_lr": 2e-4, "lr_decay_style": "linear", "adam_beta2": 0.95}
    config = _config(path, run_dir, optimizer=changed)
    _, said, learner = _resume(config)
    betas = {group["betas"] for group in learner._optimizer.param_groups}
    resumed = [_step(learner)["lr"] for _ in range(3)]
    fresh = _learner(config)
    expected = [_step(fresh)["lr"] for _ in range(5)][2:]
    return said, betas, resumed, expected


def test_a_changed_schedule_is_applied_and_said(checkpoint, tmp_path):
    ((said, betas, resumed, expected),) = run_ranks(1, _change_the_schedule, checkpoint, tmp_path)
    assert resumed == expected
    assert betas == {(0.9, 0.95)}
    for line in (
        "policy.optimizer.lr: 0.001 -> 0.0004",
        "policy.optimizer.min_lr: 0.0001 -> 0.0002",
        "policy.optimizer.lr_decay_style: cosine -> linear",
        "policy.optimizer.adam_beta2: 0.999 -> 0.95",
    ):
        assert line in said
    assert said.count(" -> ") == 4
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["policy"]["optimizer"]["lr"] == 4e-4


def _edit_the_code(path: Path, run_dir: Path) -> str:
    mine = run_dir / "mine.py"
    mine.write_text("")
    policy = _config(path, run_dir).policy.model_dump() | {"imports": str(mine)}
    config = _config(path, run_dir, policy=policy)
    _train_and_save(config, 1)
    assert "mine.py" not in _resume(config)[1]
    mine.write_text("a = 1")
    return _resume(config)[1]


def test_edited_code_is_said(checkpoint, tmp_path):
    (said,) = run_ranks(1, _edit_the_code, checkpoint, tmp_path)
    assert f"policy.imports: {tmp_path}/mine.py is not what it was\n    warning: the model" in said


def _refused(path: Path, run_dir: Path) -> list[str]:
    config = _config(path, run_dir)
    _train_and_save(config, 2)
    learner = _learner(config)
    _go_on(learner, config, 10)
    record_config(config, 3)
    in_bfloat16 = config.policy.model_copy(update={"dtype": "bfloat16"})
    moved = shutil.copytree(path, run_dir / "moved")
    other = tiny.write(run_dir / "other", tiny.qwen3(num_hidden_layers=2), seed=1)
    _go_on(learner, _config(moved, run_dir), 10)
    messages = []
    for changed, last_step in (
        (_config(path, run_dir, batch_size=3), 10),
        (config.model_copy(update={"policy": in_bfloat16}), 10),
        (config, 1),
        (_config(other, run_dir), 10),
    ):
        with pytest.raises(UserError) as error:
            _go_on(learner, changed, last_step)
        messages.append(str(error.value))
    return messages


def test_what_cannot_change_is_refused_and_the_config_stays(checkpoint, tmp_path):
    ((batch_size, dtype, steps, base),) = run_ranks(1, _refused, checkpoint, tmp_path)
    assert "batch_size: was 2" in batch_size
    assert "is 3, but cannot change in a run: the number of steps" in batch_size
    assert "policy.dtype: was float32" in dtype
    assert "is of step 2, but the config asks for 1 steps" in steps
    assert "other holds other weights than" in base
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_size"] == 2


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    roles = "user", "assistant"
    messages = [
        [{"role": role, "content": text} for role, text in zip(roles, row, strict=True)]
        for row in rows
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))


def _train_again(path: Path, folder: Path) -> tuple[str, str, str]:
    tiny.write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    data = folder / "rows.jsonl"
    _write_rows(data, ROWS)
    config = _config(path, folder / "run", data={"path": data, "max_length": 64}, steps=8)
    train_sft(config)
    data.write_text("not a row\n")
    with pytest.raises(UserError, match="batch_size: was 2"):  # before the data are read
        train_sft(config.model_copy(update={"batch_size": 3}))
    _write_rows(data, ROWS[::-1])
    with pytest.raises(UserError) as error:
        train_sft(config.model_copy(update={"steps": 12}))
    _write_rows(data, ROWS)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_sft(config.model_copy(update={"steps": 12}))
    constant = _config(
        path,
        folder / "run",
        data={"path": data, "max_length": 64},
        steps=13,
        optimizer={"lr_decay_style": "constant"},
        validation={"path": data, "every": 100},
    )
    with contextlib.redirect_stdout(io.StringIO()) as said_then:
        train_sft(constant)
    return str(error.value), said.getvalue(), said_then.getvalue()


def test_other_data_are_refused_and_each_config_of_a_run_is_kept(checkpoint, tmp_path):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    ((refusal, said, said_then),) = run_ranks(1, _train_again, base, tmp_path)
    assert "data: other rows than the checkpoint was made with, though as many" in refusal
    assert "changed, from step 9 on:\n  steps: 8 -> 12\n    warning: the learning-rate" in said
    assert "  steps: 12 -> 13\n" in said_then
    assert f"  validation.path: (absent) -> {tmp_path}/rows.jsonl\n" in said_then
    assert "warning" not in said_then
    assert not (tmp_path / "run" / "hang").exists()
    run_dir = tmp_path / "run"
    kept = {
        path.name: yaml.safe_load(path.read_text())["steps"]
        for path in (run_dir / "configs").iterdir()
    }
    assert kept == {"step_00000001.yaml": 8, "step_00000009.yaml": 12, "step_00000013.yaml": 13}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["steps"] == 13
    for step in (8, 12):
        stored = run_dir / "checkpoints" / f"step_{step:08}" / "config.yaml"
        assert yaml.safe_load(stored.read_text())["steps"] == step


def _two_stages(path: Path, folder: Path) -> list[list[Stage]]:
    tiny.write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    data = {"path": folder / "rows.jsonl", "max_length": 64}
    _write_rows(data["path"], ROWS)
    first, second = folder / "first", folder / "second"
    train_sft(_config(path, first, data=data, steps=2, export_every=2))
    megatron_to_hf(first / "checkpoints" / "step_00000002", folder / "sft-hf")
    train_sft(_config(folder / "sft-hf", second, data=data, steps=4))
    exported, converted = first / "hf" / "step_00000002", folder / "sft-hf"
    return [read_stages(one) for one in (exported, converted, second / "checkpoints" / "release")]


def test_the_stages_of_training_go_with_the_weights(checkpoint, tmp_path):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    ((exported, converted, trained),) = run_ranks(1, _two_stages, base, tmp_path)
    assert exported == converted == trained[:1]
    assert [(stage.base, stage.steps, stage.epochs) for stage in trained] == [
        ("base", 2, 0.5),
        ("sft-hf", 4, 1.0),
    ]
    assert trained[0].method == "supervised fine-tuning"
    assert trained[0].data == ["rows.jsonl"]
    assert re.fullmatch(r"\S+ core h on 1 × CPU, \d+ cores", trained[0].used)


def test_configs_of_steps_that_are_done_again_are_forgotten(checkpoint, tmp_path):
    names = run_ranks(1, _record_three, checkpoint, tmp_path)
    assert names == [["step_00000001.yaml", "step_00000003.yaml"]]


def _record_three(path: Path, run_dir: Path) -> list[str]:
    for first, batch_size in ((1, 2), (5, 3), (3, 4), (4, 4)):
        record_config(_config(path, run_dir, batch_size=batch_size), first)
    return sorted(path.name for path in (run_dir / "configs").iterdir())


def _one_rank_sees_less(path: Path, run_dir: Path) -> int:
    config = _config(path, run_dir)
    _train_and_save(config, 2)
    if dist.get_rank() == 1:  # as on a network file system, whose cache is behind
        resume_module.latest_checkpoint = lambda folder: folder / "checkpoints" / "step_00000001"
    state, *_ = _resume(config)
    return state["step"]


def test_all_ranks_resume_from_the_checkpoint_that_the_first_one_sees(checkpoint, tmp_path):
    assert run_ranks(2, _one_rank_sees_less, checkpoint, tmp_path) == [2, 2]
