"""Killed at any moment, in any layout: the run goes on from its last complete checkpoint."""

import functools
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from klear_megatron.checkpoints.megatron_folder import is_megatron_checkpoint
from klear_megatron.losses import SFTObjective
from klear_megatron.observability import Phases
from klear_megatron.policy import checkpoint
from klear_megatron.policy.checkpoint import checkpoint_path, latest_checkpoint
from klear_megatron.policy.optimizer_state import owned_shards
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training.saver import Saver
from tests.distributed.laboratory import make_learner, weights
from tests.distributed.ranks import run_ranks
from tests.distributed.reference import make_batch

BATCHES = [make_batch([9, 30, 4, 57, 16], [True] * 5, seed) for seed in range(6)]
OPTIMIZER = {"lr": 1e-2, "lr_warmup_steps": 4, "adam_eps": 1e-4}
TP, PP, VPP, CP = (
    f"{name}_parallel_size"
    for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context")
)
FIRST, LAST = (f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
EP, EXPERT_TP = "expert_model_parallel_size", "expert_tensor_parallel_size"
DENSE: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {TP: 2}),
    (2, {PP: 2, VPP: 2}),
    (4, {TP: 2, CP: 2}),
    (4, {PP: 2, LAST: 1}),
]
MOE: list[tuple[int, dict[str, int]]] = [
    (2, {EP: 2}),
    (2, {TP: 2}),
    (2, {TP: 2, EP: 2, EXPERT_TP: 1}),
    (4, {EP: 2, PP: 2, FIRST: 1}),
]


def _policy(model: Path, parallel: dict[str, int], **checkpoint: Any) -> Any:
    return make_learner(model, parallel=parallel, optimizer=OPTIMIZER, checkpoint=checkpoint)


def _steps(learner: Any, first: int, last: int) -> list[float]:
    steps = [learner.train_step(batch, SFTObjective()) for batch in BATCHES[first:last]]
    return [value for metrics in steps for value in (metrics["loss"], metrics["grad_norm"])]


def _draws() -> list[float]:
    """One number from every random state that this rank has."""
    drawn = [random.random(), np.random.random(), torch.rand(()).item()]
    drawn.append(torch.rand((), device="cuda").item())
    for name in sorted(get_cuda_rng_tracker().get_states()):
        with get_cuda_rng_tracker().fork(name):
            drawn.append(torch.rand((), device="cuda").item())
    return drawn


def _six_steps(model: Path, parallel: dict[str, int]) -> tuple[list[float], Any, Any]:
    learner = _policy(model, parallel)
    losses, first = _steps(learner, 0, 3), _draws()
    losses += _steps(learner, 3, 6)
    return losses, weights(learner), (first, _draws())


def _three_steps_and_killed(model: Path, parallel: dict[str, int], run_dir: Path) -> None:
    learner = _policy(model, parallel)
    _steps(learner, 0, 3)
    _draws()
    learner.save(checkpoint_path(run_dir, 3), {"step": 3})
    _steps(learner, 3, 4)
    os.kill(os.getpid(), signal.SIGKILL)


def _resumed(model: Path, parallel: dict[str, int], run_dir: Path) -> tuple[Any, ...]:
    learner = _policy(model, parallel)
    lines: list[str] = []
    checkpoint._logger.warning = lines.append
    state = learner.load(latest_checkpoint(run_dir))
    losses = _steps(learner, state["step"], 6)
    return losses, weights(learner), _draws(), lines


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tied", DENSE[1], DENSE),
        ("untied", DENSE[2], DENSE),
        ("moe", MOE[0], MOE),
        ("moe", MOE[1], MOE),
    ],
)
def test_a_killed_run_goes_on_in_any_layout(name, before, after, folder, tmp_path):
    model, (world_size, parallel) = folder / name, before
    unbroken = run_ranks(world_size, _six_steps, model, parallel)
    losses, final, _ = unbroken[0]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(world_size, _three_steps_and_killed, model, parallel, tmp_path)
    for other_size, other in after:
        ranks = run_ranks(other_size, _resumed, model, other, tmp_path)
        resumed, restored, _, lines = ranks[0]
        if other == parallel:
            assert resumed == losses[6:]
            assert all(torch.equal(restored[name], final[name]) for name in final)
            for (_, _, (first, later)), (_, _, drawn, _) in zip(unbroken, ranks, strict=True):
                assert drawn == later
                assert all(a != b for a, b in zip(first, later, strict=True))
        assert len(lines) == (other != parallel)
        assert all("random states are seeded afresh" in line for line in lines)
        assert resumed == pytest.approx(losses[6:], rel=1e-5)
        for name in final:
            torch.testing.assert_close(restored[name], final[name], rtol=1e-4, atol=1e-6)


def _killed_while_writing(model: Path, run_dir: Path, asynchronous: bool) -> None:
    learner = _policy(model, {}, asynchronous=asynchronous)
    learner.load(latest_checkpoint(run_dir))
    _steps(learner, 3, 5)
    original = filesystem_async._write_item

    @functools.wraps(original)
    def write_one_and_die(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        os.killpg(0, signal.SIGKILL)

    filesystem_async._write_item = write_one_and_die
    learner.save(checkpoint_path(run_dir, 5), {"step": 5})
    learner.finish_saves()


def _killed_before_publishing(model: Path, run_dir: Path) -> None:
    learner = _policy(model, {})
    learner._writer._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    learner.save(checkpoint_path(run_dir, 9), {"step": 9})


def test_a_save_that_is_killed_is_never_picked_up(folder, tmp_path):
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, _three_steps_and_killed, folder / "tied", {}, tmp_path)
    complete = checkpoint_path(tmp_path, 3)
    interruptions = [
        (_killed_while_writing, False),
        (_killed_while_writing, True),
        (_killed_before_publishing,),
    ]
    for function, *arguments in interruptions:
        with pytest.raises(AssertionError, match="died without a word"):
            run_ranks(2, function, folder / "tied", tmp_path, *arguments)
        assert latest_checkpoint(tmp_path) == complete
        assert [p for p in complete.parent.iterdir() if p.suffix == ".partial"]
    losses, *_ = run_ranks(2, _six_steps, folder / "tied", {})[0]
    assert run_ranks(2, _resumed, folder / "tied", {}, tmp_path)[0][0] == losses[6:]


def _saves(model: Path, parallel: dict[str, int], run_dir: Path) -> Any:
    learner = _policy(model, parallel, asynchronous=True, keep_last=2, keep_every=3)
    snapshots = []
    for step, batch in enumerate(BATCHES, start=1):
        learner.train_step(batch, SFTObjective())
        snapshots.append(_state(learner))
        learner.save(checkpoint_path(run_dir, step), {"step": step})
    learner.finish_saves()
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    loaded = []
    for name in kept:
        state = learner.load(run_dir / "checkpoints" / name)
        loaded.append((state["step"], _state(learner)))
    return snapshots, kept, loaded


def _state(learner: Any) -> dict[str, torch.Tensor]:
    """The full weights, on rank 0, and this rank's shard of the optimizer's state."""
    shards = owned_shards(learner._optimizer)
    return weights(learner) | {
        f"{number} {name}": value.detach().clone()
        for number, shard in enumerate(shards)
        for name, value in shard.state.items()
    }


@pytest.mark.parametrize(
    ("name", "world_size", "parallel"),
    [
        ("tied", 2, {TP: 2}),
        ("untied", 2, {PP: 2, VPP: 2}),
        ("moe", 4, {PP: 2, VPP: 2, EP: 2}),
    ],
)
def test_saving_in_the_background_keeps_the_moment_and_the_newest_and_every_nth(
    name, world_size, parallel, folder, tmp_path
):
    ranks = run_ranks(world_size, _saves, folder / name, parallel, tmp_path)
    for snapshots, kept, loaded in ranks:
        assert kept == ["step_00000003", "step_00000005", "step_00000006"]
        assert [step for step, _ in loaded] == [3, 5, 6]
        for step, restored in loaded:
            assert restored.keys() == snapshots[step - 1].keys()
            for key, tensor in snapshots[step - 1].items():
                assert torch.equal(restored[key], tensor), (step, key)


def _announcements(model: Path, run_dir: Path) -> Any:
    """Lines said before the save was finished and in all, with whether the checkpoint existed."""
    path = checkpoint_path(run_dir, 1)
    said: list[tuple[str, bool]] = []
    checkpoint.say = lambda line: said.append((line, is_megatron_checkpoint(path)))
    learner = _policy(model, {}, asynchronous=True)
    config = SFTConfig.model_validate(
        {
            "run_dir": run_dir,
            "policy": {"path": model, "optimizer": {"lr": 1e-3}},
            "data": {"path": "unread.jsonl", "max_length": 8},
            "batch_size": 2,
            "epochs": 1,
            "save_every": 1,
        }
    )
    saver = Saver(learner, config, last_step=2, step=0, state=dict)
    saver.trained(1)
    saver.save_what_is_due(Phases(), None)
    early = list(said)
    learner.finish_saves()
    return early, said


def test_a_checkpoint_is_announced_when_it_exists(folder, tmp_path):
    ((early, said),) = run_ranks(1, _announcements, folder / "tied", tmp_path)
    assert early == []
    assert said == [(f"checkpoint {checkpoint_path(tmp_path, 1)}", True)]


def _saved_as_megatron_does(
    model: Path, parallel: dict[str, int], path: Path
) -> dict[str, torch.Tensor]:
    learner = _policy(model, parallel)
    _steps(learner, 0, 2)
    chunks, optimizer = learner.model.chunks, learner._optimizer
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    sharded = checkpoint._model_state(chunks)
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    state = {
        **sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, metadata=metadata),
        "scheduler": learner._scheduler.state_dict(),
        "parallel_sizes": {},
        "trainer": {"step": 2},
    }
    dist_checkpointing.save(state, str(path))
    return _state(learner)


def _loaded(
    model: Path, parallel: dict[str, int], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    learner = _policy(model, parallel)
    learner.load(path)
    return _state(learner), _shapes(path)


def _saved(model: Path, parallel: dict[str, int], path: Path) -> dict[str, Any]:
    learner = _policy(model, parallel)
    learner.save(path, {"step": 0})
    return _shapes(path)


def _shapes(path: Path) -> dict[str, Any]:
    """The whole shape and the dtype of every tensor in a checkpoint."""
    tensors = dist_checkpointing.load_tensors_metadata(str(path))
    return {name: (tensor.global_shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "world_size", "parallel"),
    [("untied", 4, {TP: 2}), ("tied", 4, {PP: 2, LAST: 1}), ("moe", 4, {EP: 2})],
)
def test_the_format_is_megatrons_fully_reshardable(name, world_size, parallel, folder, tmp_path):
    theirs, where = tmp_path / "theirs", (folder / name, parallel)
    saved = run_ranks(world_size, _saved_as_megatron_does, *where, theirs)
    loaded = run_ranks(world_size, _loaded, *where, theirs)
    for before, (after, _) in zip(saved, loaded, strict=True):
        assert before.keys() == after.keys()
        for key in before:
            assert torch.equal(before[key], after[key]), key
    shapes = loaded[0][1]
    assert any(name.startswith("optimizer.state.exp_avg.decoder.layers.") for name in shapes)
    ours = tmp_path / "ours"
    assert run_ranks(world_size, _saved, *where, ours)[0] == shapes
    # Also where Megatron-Core 0.19 wrote it, 0.16 finds its common objects.
    common = torch.load(ours / "common.pt", weights_only=False)
    assert common.keys() >= {"optimizer", "scheduler", "parallel_sizes", "trainer", "args"}
