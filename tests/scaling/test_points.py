"""Which points an experiment has, and which results are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from klear_megatron.config import load_config, validate, write_config
from klear_megatron.errors import UserError
from klear_megatron.scaling import results
from klear_megatron.scaling.config import ScalingConfig, points
from klear_megatron.scaling.plots import curves, over_ranks
from klear_megatron.scaling.run import _why_it_failed, check_points
from tests.distributed.ranks import run_ranks
from tests.models import tiny

CP2 = {"ranks": 2, "parallel": {"context_parallel_size": 2}}


def experiment(path: Path = Path("model"), **changes: Any) -> ScalingConfig:
    values = {
        "run_dir": path.parent / "run",
        "policy": {"path": path, "optimizer": {"lr": 1e-3}},
        "lengths": [256, 64],
        "layouts": {"one": {"ranks": 1}, "cp2": CP2},
        "variants": {"plain": {}, "again": {"recompute_granularity": "full"}},
        "tokens_per_step": 150,
    }
    return validate(ScalingConfig, {**values, **changes}, "experiment:")


def row(length: int, layout: str, ranks: int, speed: float, **changes: Any) -> dict[str, Any]:
    return {
        "length": length,
        "layout": layout,
        "variant": "plain",
        "ranks": ranks,
        "outcome": "measured",
        "tokens_per_second_per_gpu": speed,
        "planned_tokens_per_second_per_gpu": 10.0 if layout == "cp2" else 9.0,
        **changes,
    }


def test_every_length_layout_and_variant_makes_a_point():
    found = points(experiment())
    assert [point.name for point in found[:5]] == [
        *("64.one.plain", "64.one.again", "64.cp2.plain", "64.cp2.again", "256.one.plain")
    ]
    assert len(found) == 8
    assert found[2].policy.parallel.context_parallel_size == 2
    assert [point.policy.recompute_granularity for point in found[:2]] == [None, "full"]


def test_a_layout_can_have_lengths_of_its_own():
    layouts = {"one": {"ranks": 1, "lengths": [64]}, "cp2": CP2}
    found = points(experiment(layouts=layouts, variants={"plain": {}}))
    assert [point.name for point in found] == ["64.one.plain", "64.cp2.plain", "256.cp2.plain"]
    with pytest.raises(UserError, match=r"layouts.one.lengths: \[32\] are not in lengths"):
        experiment(layouts={"one": {"ranks": 1, "lengths": [32]}})


@pytest.mark.parametrize(("scaling", "sequences"), [("strong", (2, 2)), ("weak", (2, 4))])
def test_weak_scaling_gives_each_rank_as_much_as_one_rank_has(scaling, sequences):
    found = {point.name: point for point in points(experiment(scaling=scaling))}
    assert (found["64.one.plain"].sequences, found["64.cp2.plain"].sequences) == sequences
    assert found["256.one.plain"].lengths == (256,), "at least one sequence"


def test_the_written_config_has_the_same_points(tmp_path):
    config = experiment()
    write_config(config, tmp_path / "config.yaml")
    assert points(load_config(ScalingConfig, tmp_path / "config.yaml")) == points(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"fast": {"recompute": "full"}}}, "variants.fast, layouts.one:"),
        ({"layouts": {"a/b": {"ranks": 1}}}, "String should match pattern"),
        ({"lengths": [512]}, "a sequence of 512 tokens is beyond the model's max_position"),
        ({"layouts": {"cp2": {**CP2, "ranks": 3}}}, "world size 3 is not divisible"),
        (
            {"layouts": {"tp3": {"ranks": 3, "parallel": {"tensor_model_parallel_size": 3}}}},
            "num_attention_heads = 8 is not divisible by 3",
        ),
    ],
    ids=["setting", "name", "length", "ranks", "heads"],
)
def test_points_that_cannot_be_are_refused(changes, message, tmp_path):
    tiny.qwen3(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError) as refusal:
        check_points(experiment(tmp_path / "model", **changes))
    assert message in str(refusal.value)


def test_a_model_of_an_architecture_of_the_users_own_can_be_measured(tmp_path):
    tiny.qwen3(architectures=["MyModelForCausalLM"]).save_pretrained(tmp_path / "model")
    config = experiment(tmp_path / "model")
    # In processes of their own, because the architecture stays known.
    with pytest.raises(AssertionError, match="unknown architecture 'MyModelForCausalLM'"):
        run_ranks(1, check_points, config)
    policy = {**config.policy.model_dump(), "imports": ["tests.models.my_architecture"]}
    (found,) = run_ranks(1, check_points, experiment(tmp_path / "model", policy=policy))
    assert len(found) == 8


def test_a_result_is_kept_while_its_settings_are_the_same_and_it_is_no_failure(tmp_path):
    config = experiment(tmp_path / "model")
    first, second, *_ = points(config)
    results.record(config, first, results.OUT_OF_MEMORY, "too much", {})
    results.record(config, second, results.FAILED, "a cable", {})
    kept = results.read_kept(config, first)
    assert kept is not None
    assert kept["reason"] == "too much"
    assert results.read_kept(config, second) is None
    assert results.read(config, second) is not None
    other = experiment(tmp_path / "model", memory_limit_gib=1)
    assert results.read(other, points(other)[0]) is None
    more = experiment(tmp_path / "model", lengths=[32, 64])  # the point has another number there
    assert results.read_kept(more, points(more)[4]) == kept


def test_the_tables_say_where_a_layout_begins_to_pay(tmp_path):
    rows = [
        row(64, "dp2", 2, 9.0),
        row(64, "cp2", 2, 6.0),
        row(256, "dp2", 2, 4.0),
        row(256, "cp2", 2, 5.0),
        row(512, "dp2", 2, 0.0, outcome="out of memory"),
    ]
    assert results.summary(rows).splitlines()[2:] == [
        "| 64 | 2 | dp2, plain | 9 | cp2, plain |  |",
        "| 256 | 2 | cp2, plain | 5 | cp2, plain |  |",
        "| 512 | 2 |  |  |  | dp2, plain: out of memory |",
    ]
    results.write_tables(tmp_path, [{**one, "settings": {"seed": 0}} for one in rows])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["settings"] == {"seed": 0}
    assert (tmp_path / "results.csv").read_text().splitlines()[2].startswith("64,cp2,plain,2,")


def test_curves_leave_out_what_was_not_measured():
    rows = [
        row(256, "dp2", 2, 4.0),
        row(64, "dp2", 2, 9.0),
        row(64, "cp2", 2, 6.0),
        row(64, "one", 1, 8.0),
        row(512, "dp2", 2, 0.0, outcome="out of time"),
    ]
    found = curves(rows, "tokens_per_second_per_gpu")
    assert found["dp2, plain"] == [(64, 9.0), (256, 4.0)]
    assert over_ranks(rows) == {"64 tokens, plain": [(1, 8.0), (2, 18.0)]}


@pytest.mark.parametrize(
    ("log", "outcome", "reason"),
    [
        (
            "[rank1]: RuntimeError: Connection closed by peer\nE\n  Root Cause (first observed "
            "failure):\n  rank : 0\n  exitcode  : -9 (pid: 7)\n",
            results.OUT_OF_MEMORY,
            "a rank was killed by SIGKILL",
        ),
        (
            "    raise UserError(\nerror on rank 1: models/x: no such folder\n  Root Cause (first "
            "observed failure):\n  exitcode  : 2 (pid: 7)\n",
            results.FAILED,
            "error on rank 1: models/x: no such folder",
        ),
        ("[rank0]: ValueError: 3 is odd\n", results.FAILED, "[rank0]: ValueError: 3 is odd"),
        ("nothing\n", results.FAILED, "see "),
    ],
    ids=["killed", "bad input", "exception", "silent"],
)
def test_the_log_says_why_a_point_failed(log, outcome, reason, tmp_path):
    (tmp_path / "point.log").write_text(log)
    found, why = _why_it_failed(tmp_path / "point.log")
    assert found == outcome
    assert why.startswith(reason)
