import json
import math
import time
from unittest import mock

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from klear_megatron.observability import Recorder


def rows(run_dir):
    """Without the time, which the recorder adds."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "progress/wall_time"} for row in found]


def test_tensorboard_and_the_file_have_the_same_numbers(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in (1, 2):
            recorder.write(step, {"train/loss": 0.5 / step, "reward/mean": -1.0})
            if step == 1:
                recorder.add({"seconds/save": 4.0})
    assert rows(tmp_path) == [
        {"step": 1, "train/loss": 0.5, "reward/mean": -1.0, "seconds/save": 4.0},
        {"step": 2, "train/loss": 0.25, "reward/mean": -1.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("seconds/save")] == [(1, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]


def test_resumed_run_forgets_the_steps_it_does_again_and_a_half_written_line(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in range(1, 6):
            recorder.write(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    with Recorder(tmp_path, next_step=4) as recorder:
        recorder.write(4, {"x": 40})
    assert rows(tmp_path) == [{"step": s, "x": x} for s, x in [(1, 1), (2, 2), (3, 3), (4, 40)]]


def test_number_that_is_not_finite_leaves_valid_json(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.write(1, {"x": math.nan, "y": math.inf})
    assert rows(tmp_path) == [{"step": 1, "x": None, "y": None}]


def test_the_time_goes_on_where_the_kept_steps_end(tmp_path):
    clock = iter([0.0, 10.0, 20.0, 1000.0, 1003.0])
    with mock.patch.object(time, "monotonic", side_effect=clock.__next__):
        with Recorder(tmp_path) as recorder:
            recorder.write(1, {})
            recorder.add({"seconds/save": 2.0})
            recorder.write(2, {})
        with Recorder(tmp_path, next_step=2) as recorder:
            recorder.write(2, {})
    times = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["progress/wall_time"] for row in times] == [10.0, 15.0]
