"""What a step's responses look like on the disk."""

import gzip
import json

import pytest

from klear_megatron.errors import UserError
from klear_megatron.observability import RolloutFiles


def write(files, step, leader, *, tokens=True):
    rows = [{"index": 10 * leader + i} for i in range(2)]
    files.write_texts(step, leader, rows)
    if tokens:
        files.write_tokens(step, leader, [{"token_ids": [step, row["index"]]} for row in rows])


def test_the_files_of_all_leaders_are_read_line_by_line_together(tmp_path):
    files = RolloutFiles(tmp_path)
    write(files, 7, 0)
    write(files, 7, 1, tokens=False)
    assert list(files.read(7)) == [
        {"index": 0, "token_ids": [7, 0]},
        {"index": 1, "token_ids": [7, 1]},
        {"index": 10},
        {"index": 11},
    ]
    # What docs/rollouts.md says suffices to read them.
    with gzip.open(tmp_path / "rollouts" / "step_00000007_0.tokens.jsonl.gz") as packed:
        assert [json.loads(line) for line in packed] == [{"token_ids": [7, i]} for i in (0, 1)]
    with pytest.raises(UserError, match="no rollouts of step 8; there are those of steps 7 to 7"):
        list(files.read(8))


def test_a_resumed_run_has_no_later_rollouts_of_leaders_that_are_gone(tmp_path):
    files = RolloutFiles(tmp_path)
    for step in (1, 2, 3):
        for leader in (0, 1):
            write(files, step, leader)
    files.forget(from_step=2)
    write(files, 2, 0)
    assert files.steps() == [1, 2]
    assert [row["index"] for row in files.read(1)] == [0, 1, 10, 11]
    assert [row["index"] for row in files.read(2)] == [0, 1]


def test_only_the_newest_steps_keep_their_tokens(tmp_path):
    files = RolloutFiles(tmp_path)
    for step in (1, 2, 3):
        write(files, step, 0)
    files.forget_tokens(before=3)
    kept = {step: "token_ids" in next(files.read(step)) for step in files.steps()}
    assert kept == {1: False, 2: False, 3: True}


def test_the_folder_is_listed_once_for_all_steps(tmp_path, monkeypatch):
    files = RolloutFiles(tmp_path)
    for step in range(1, 6):
        write(files, step, 0)
    listings = []
    monkeypatch.setattr(RolloutFiles, "_all", _counted(RolloutFiles._all, listings))
    assert [row["index"] for step in files.steps() for row in files.read(step)] == [0, 1] * 5
    assert len(listings) == 1
    write(files, 6, 0)
    assert files.steps()[-1] == 6


def _counted(function, calls):
    return lambda self: calls.append(1) or function(self)
