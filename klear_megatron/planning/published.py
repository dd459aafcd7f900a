"""The planner held against speeds that others published, and the few constants fitted to them."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from klear_megatron.planning.hardware import Efficiency, read_hardware
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.plan import Plan, plan
from klear_megatron.planning.work import Work
from klear_megatron.policy.config import PolicyConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 2**20,
}


@dataclass(frozen=True)
class Comparison:
    """A published row beside its plan."""

    row: Mapping[str, Any]
    planned: float
    """In the row's unit: tokens/s or model TFLOP/s, per GPU."""

    @property
    def error(self) -> float:
        """Relative: 0.1 where the planner promises a tenth more."""
        return self.planned / float(self.row["value"]) - 1


@cache
def _data() -> dict[str, Any]:
    text = (files(__package__) / "published.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def rows(*kinds: str) -> list[dict[str, Any]]:
    """The rows of these kinds."""
    return [row for row in _data()["rows"] if row["kind"] in kinds]


@cache
def published_model(name: str, layers: int | None = None) -> PlannedModel:
    """A model of `published.yaml`, with another number of layers if one is given."""
    fields = dict(_data()["models"][name])
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    architectures = [_ARCHITECTURES[fields["model_type"]]]
    return PlannedModel(SimpleNamespace(**_COMMON, **fields, architectures=architectures))


def plan_row(row: Mapping[str, Any], efficiency: Efficiency | None = None) -> Plan:
    """The plan of a published run. What its source does not say is assumed: micro-batches of one
    sequence, communication of gradients and weights overlapped, no recomputation."""
    hardware = read_hardware(row["gpu"])
    if efficiency is not None:
        hardware = hardware.model_copy(update={"efficiency": efficiency})
    model = published_model(row["model"], row.get("assumed", {}).get("layers"))
    policy = PolicyConfig.model_validate(
        {
            "path": Path(row["model"]),
            "optimizer": {"lr": 1e-5},
            "fp8": "delayed" if row["precision"] == "fp8" else None,
            "tokens_per_micro_batch": row["length"] // row["cp"],
            "parallel": _parallel(row),
        }
    )
    work = Work((row["length"],) * row["sequences"])
    return plan(policy, work, gpus=row["gpus"], hardware=hardware, model=model, fused=True)


def _parallel(row: Mapping[str, Any]) -> dict[str, Any]:
    pp, vpp = row["pp"], row.get("vpp") or row.get("assumed", {}).get("vpp", 1)
    return {
        "tensor_model_parallel_size": row["tp"],
        "context_parallel_size": row["cp"],
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "expert_model_parallel_size": row.get("ep", 1),
        "expert_tensor_parallel_size": 1 if row.get("ep", 1) > 1 else None,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }


def compare(row: Mapping[str, Any], efficiency: Efficiency | None = None) -> Comparison:
    """A row beside its plan."""
    planned = plan_row(row, efficiency)
    if row.get("tokens", False):
        return Comparison(row, planned.tokens_per_second_per_gpu)
    model, lengths = published_model(row["model"]), (row["length"],) * row["sequences"]
    flops = model.model_flops(lengths) / planned.seconds.total / row["gpus"]
    return Comparison(row, flops / 1e12)


def median_error(comparisons: list[Comparison]) -> float:
    """The median of the absolute errors."""
    return statistics.median(abs(comparison.error) for comparison in comparisons)


def fit(start: Efficiency, on: Mapping[str, Mapping[str, Any]]) -> Efficiency:
    """Efficiencies with which each row is met by the constant that it sets.

    Args:
        on: the name of an efficiency -> the row that sets it.
    """
    efficiency = start
    for _ in range(4):  # each constant moves the other rows a little
        for name, row in on.items():
            efficiency = efficiency.model_copy(update={name: _meet(efficiency, name, row)})
    return efficiency


def left_out(row: Mapping[str, Any]) -> Comparison:
    """A row beside what is planned without it: another row sets the efficiency that it sets."""
    if "instead" not in row:
        return compare(row)
    (instead,) = (other for other in rows(row["kind"]) if other["id"] == row["instead"])
    return compare(row, fit(Efficiency(), {row["fitted"]: instead}))


def _meet(efficiency: Efficiency, name: str, row: Mapping[str, Any]) -> float:
    low, high = 0.05, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        error = compare(row, efficiency.model_copy(update={name: middle})).error
        low, high = (middle, high) if error < 0 else (low, middle)
    return (low + high) / 2
