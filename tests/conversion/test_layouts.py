"""Checkpoints of every layout convert to the same Hugging Face weights and back."""

from pathlib import Path

import pytest
import torch

from klear_megatron.conversion import export_hf, hf_to_megatron, megatron_to_hf
from klear_megatron.policy.checkpoint import load_weights
from tests.conversion.folders import same_weights, weights_of
from tests.distributed.laboratory import logits, make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny

ARCHITECTURES = {
    "qwen3": tiny.qwen3,
    "qwen2": tiny.qwen2,
    "llama3": tiny.llama3,
    "qwen3-moe": tiny.qwen3_moe,
}
MODELS = {name: make() for name, make in ARCHITECTURES.items()} | {
    f"{name}-tied": make(tie_word_embeddings=True) for name, make in ARCHITECTURES.items()
}
MOE = ["qwen3-moe", "qwen3-moe-tied"]
DENSE = [name for name in MODELS if name not in MOE]
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "virtual_pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 1}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "single": (1, {}, list(MODELS)),
    "tp2": (2, TP2, list(MODELS)),
    "pp2": (2, PP2, list(MODELS)),
    "vpp": (2, VPP, list(MODELS)),
    "uneven-pp2": (2, UNEVEN, list(MODELS)),
    "ep2": (2, EP2, MOE),
    "tp4": (4, {"tensor_model_parallel_size": 4}, DENSE),
    "tp2-pp2": (4, {**TP2, **PP2}, list(MODELS)),
    "tp2-ep2": (4, {**TP2, **EP2}, MOE),
}
CASES = [(name, model) for name, (_, _, models) in LAYOUTS.items() for model in models]
SEQUENCES = tiny.random_sequences([5, 31, 1, 17])


def _on_ranks(cases: list[tuple[str, str]], folder: Path) -> list[torch.Tensor | None]:
    """In each layout, loads and exports the converted weights, then steps, saves and exports.

    Returns:
        The logits of the converted weights, if this rank has them.
    """
    answers = []
    for name, model in cases:
        learner = make_learner(folder / model / "hf", parallel=LAYOUTS[name][1])
        parameters = [
            parameter for chunk in learner.model.chunks for parameter in chunk.parameters()
        ]
        for parameter in parameters:
            parameter.data.fill_(torch.nan)
        load_weights(folder / model / "megatron", learner.model.chunks)
        export_hf(learner.model, folder / model / f"{name}-loaded", lambda _: None)
        answers.append(logits(learner, SEQUENCES))
        for parameter in parameters:
            parameter.main_grad.fill_(1.0)
        learner._optimizer.reload_model_params()
        learner._optimizer.step()
        learner.save(folder / model / f"{name}-saved", {"step": 1})
        export_hf(learner.model, folder / model / f"{name}-stepped", lambda _: None)
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<model>/hf`, written by transformers, and `<model>/megatron`, its conversion."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, config in MODELS.items():
        hf = tiny.write(folder / name / "hf", config)
        hf_to_megatron(hf, folder / name / "megatron", tensor_parallel_size=2, shard_bytes=100_000)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, torch.Tensor]:
    """Hugging Face's logits: [tokens of all sequences, vocabulary]."""
    with torch.no_grad():
        models = {name: tiny.load(folder / name / "hf") for name in MODELS}
        return {
            name: torch.cat([model(torch.tensor([s])).logits[0] for s in SEQUENCES])
            for name, model in models.items()
        }


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[tuple[str, str], list[torch.Tensor]]:
    """(layout, model) -> the logits of every rank that has them."""
    answers = {}
    for world_size in (1, 2, 4):
        cases = [case for case in CASES if LAYOUTS[case[0]][0] == world_size]
        ranks = run_ranks(world_size, _on_ranks, cases, folder, timeout=300)
        for case, each in zip(cases, zip(*ranks, strict=True), strict=True):
            answers[case] = [logits for logits in each if logits is not None]
    return answers


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_bit_identical(model: str, folder: Path) -> None:
    megatron_to_hf(folder / model / "megatron", folder / model / "back")
    assert same_weights(weights_of(folder / model / "back"), weights_of(folder / model / "hf"))
    assert type(tiny.load(folder / model / "back").config) is type(MODELS[model])


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_layout(
    layout: str,
    model: str,
    folder: Path,
    ours: dict[tuple[str, str], list[torch.Tensor]],
    reference: dict[str, torch.Tensor],
) -> None:
    original = weights_of(folder / model / "hf")
    assert same_weights(weights_of(folder / model / f"{layout}-loaded"), original)
    assert ours[layout, model]
    for each in ours[layout, model]:
        assert tiny.relative_error(each, reference[model]) < 1e-5

    stepped = weights_of(folder / model / f"{layout}-stepped")
    assert not same_weights(stepped, original)
    back = folder / model / f"{layout}-back"
    megatron_to_hf(folder / model / f"{layout}-saved", back, shard_bytes=60_000)
    assert same_weights(weights_of(back), stepped)
