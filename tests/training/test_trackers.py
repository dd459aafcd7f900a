"""Weights & Biases and MLflow get the metrics of a run, also of one that was resumed.

The libraries are no part of the tests' environment. docs/tracking.md says how to run these.
"""

import contextlib
import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from klear_megatron.errors import Stopped, UserError
from klear_megatron.observability import Recorder
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training import trackers
from klear_megatron.training.config import TrackersConfig


def make_config(run_dir: Path, **settings: Any) -> SFTConfig:
    run_dir.mkdir(exist_ok=True)
    values = {
        "policy": {"path": "base", "optimizer": {"lr": 1e-3}},
        "data": {"path": "a.jsonl"},
        "batch_size": 4,
    }
    return SFTConfig.model_validate(values | {"run_dir": run_dir, "trackers": settings})


def record(config: SFTConfig, steps: range, error: Exception | None = None) -> None:
    """One start of a run, which ends with the error."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(trackers, "is_main_rank", lambda: True)
        if error is not None:
            stack.enter_context(contextlib.suppress(type(error)))
        recorder = trackers.make_recorder(config, steps.start, stack)
        assert recorder is not None
        for step in steps:
            recorder.write(step, {"train/loss": step / 4, "eval/sums/pass_at_2": float("nan")})
        if error is not None:
            raise error


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == package else found(x))
    wanted = {"wandb": {}, "mlflow": {"tracking_uri": "x"}}
    with pytest.raises(UserError, match=rf"pip install 'klear-megatron\[{package}\]'"):
        TrackersConfig.model_validate({package: wanted[package]}).check_installed()
    TrackersConfig().check_installed()


class Broken:
    name = "broken"
    asked = 0
    failed: bool | None = None

    def write(self, step: int, metrics: Any) -> None:
        self.asked += 1
        raise ConnectionError("no route")

    def close(self, *, failed: bool) -> None:
        self.failed = failed


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    broken = Broken()
    with Recorder(tmp_path, trackers=[broken]) as recorder:
        for step in (1, 2):
            recorder.write(step, {"x": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert broken.asked == 1
    assert "step 1: broken does not take metrics" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
def test_mlflow_has_the_metrics_of_all_starts_in_one_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # MLflow keeps the config in a folder here
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = make_config(tmp_path / "run", mlflow={"tracking_uri": uri, "experiment": "sums"})
    record(config, range(1, 4), Stopped())
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"  # a stopped run has not failed
    record(config, range(3, 5), RuntimeError())
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    steps = [(metric.step, metric.value) for metric in history]
    assert sorted(steps) == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0)]
    assert run.data.metrics.keys() == {"train/loss", "progress/wall_time"}
    kept = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert "batch_size: 4" in Path(kept).read_text()


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: blocks of 32 KiB, of pieces with a checksum, a length and a
    type. A header of seven bytes is in the first block."""
    record, place = b"", 7
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<4xHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_has_the_metrics_of_all_starts_in_one_run(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    config = make_config(tmp_path / "run", wandb={"mode": "offline", "project": "sums"})
    record(config, range(1, 4), RuntimeError())
    record(config, range(3, 5))
    deadline, exits, records = time.monotonic() + 60, [], []
    while len(exits) < 2 and time.monotonic() < deadline:  # wandb's own process writes them
        files = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
        records = [Record.FromString(one) for f in files for one in leveldb_log(f.read_bytes())]
        exits = [one.exit.exit_code for one in records if one.WhichOneof("record_type") == "exit"]
        time.sleep(0.2)
    assert exits == [1, 0]
    runs = [one.run for one in records if one.WhichOneof("record_type") == "run"]
    assert {run.project for run in runs} == {"sums"}
    assert len({run.run_id for run in runs}) == 1
    assert "batch_size" in {item.key for run in runs for item in run.config.update}
    rows = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in one.history.item}
        for one in records
        if one.WhichOneof("record_type") == "history"
    ]
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (step, step / 4) for step in (1, 2, 3, 3, 4)
    ]
    assert all("eval/sums/pass_at_2" not in row for row in rows)
