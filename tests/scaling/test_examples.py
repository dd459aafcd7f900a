"""The examples of long context are configs that can run."""

from pathlib import Path

from klear_megatron.config import load_config
from klear_megatron.planning import PlannedModel, Work, read_hardware, search
from klear_megatron.scaling.config import ScalingConfig, points
from klear_megatron.scaling.run import check_points
from tests.models.published import qwen3_8b

FOLDER = Path(__file__).parents[2] / "examples" / "long_context"
QWEN3_8B = qwen3_8b(1048576)


def test_the_h100_experiment_has_the_layout_that_the_planner_finds_fastest(tmp_path):
    QWEN3_8B.save_pretrained(tmp_path)
    config = load_config(ScalingConfig, FOLDER / "h100_8b.yaml", ["--policy.path", str(tmp_path)])
    found = check_points(config)
    model = PlannedModel.read(tmp_path)
    for length in config.lengths:
        here = [point for point in found if point.length == length]
        work = Work(here[0].lengths)
        hardware = read_hardware("h100")
        best = search(config.policy, work, gpus=64, hardware=hardware, model=model).fitting[0]
        chosen = best.policy.parallel, best.policy.recompute_granularity
        measured = [(point.policy.parallel, point.policy.recompute_granularity) for point in here]
        assert chosen in measured, f"{length} tokens: {best.layout}"


def test_the_cpu_experiment_compares_layouts_on_the_same_ranks():
    found = points(load_config(ScalingConfig, FOLDER / "cpu.yaml"))
    assert {point.length for point in found} == {2**n * 1024 for n in range(6)}
    for length in (1024, 32768):
        here = [
            point.policy.parallel for point in found if (point.length, point.ranks) == (length, 2)
        ]
        assert {parallel.context_parallel_size for parallel in here} == {1, 2}
    assert {point.policy.recompute_granularity for point in found} == {None, "full"}
