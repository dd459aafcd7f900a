"""The example configs can run, as far as that can be checked without GPUs."""

import re
from pathlib import Path

import pytest
import yaml

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.config import load_config
from klear_megatron.config.imports import import_module
from klear_megatron.curation import CurateConfig
from klear_megatron.evaluation import EvalConfig
from klear_megatron.evaluation.yarn import extend_context
from klear_megatron.planning import PlannedModel, read_hardware
from klear_megatron.planning.servers import plan_servers
from klear_megatron.rl.config import RLConfig
from klear_megatron.rollout import ServeConfig
from klear_megatron.rollout.external_servers import check_lengths
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training.config import RunConfig
from tests.models.published import qwen3_8b

FOLDER = Path(__file__).parents[2] / "examples" / "klear_reasoner_8b"
QWEN3_8B = qwen3_8b(32768)


@pytest.fixture
def model_folder(tmp_path: Path) -> ModelFolder:
    QWEN3_8B.save_pretrained(tmp_path)
    return ModelFolder(tmp_path)


@pytest.mark.parametrize(
    ("name", "lr", "optimizer_steps"), [("math_rl", 1e-6, 8), ("code_rl", 5e-7, 4)]
)
def test_rl_has_the_papers_numbers_and_fits_the_model(name, lr, optimizer_steps, model_folder):
    config = load_config(RLConfig, FOLDER / f"{name}.yaml")
    assert config.policy.optimizer.lr == lr
    assert config.optimizer_steps == config.steps * optimizer_steps
    assert config.prompts_per_step * config.max_generation_batches == 256
    config.policy.parallel.check_model(model_folder)
    assert config.policy.parallel.data_parallel_size(32) == 4
    for sampling in (config.sampling, config.evaluation.sampling):
        check_lengths(config.rollout, QWEN3_8B, config.data.max_prompt_length, sampling)
    assert pack(config) == config.data.max_prompt_length + config.sampling.max_response_length


def pack(config: RunConfig) -> int:
    """The tokens of a micro-batch, summed over all context-parallel ranks."""
    return config.policy.tokens_per_micro_batch * config.policy.parallel.context_parallel_size


def test_sft_fits_the_model(model_folder):
    config = load_config(SFTConfig, FOLDER / "sft.yaml")
    config.policy.parallel.check_model(model_folder)
    assert (config.policy.optimizer.lr, config.policy.optimizer.min_lr) == (8e-5, 4e-5)
    assert pack(config) == config.data.max_length


def test_evaluation_has_room_for_its_budget():
    config = load_config(EvalConfig, FOLDER / "eval.yaml")
    rollout = extend_context(config.rollout, QWEN3_8B, config.yarn)
    longest = max(benchmark.max_prompt_length for benchmark in config.benchmarks.values())
    check_lengths(rollout, QWEN3_8B, longest, config.sampling)
    assert rollout.context_length == 81920


def test_servers_for_other_hosts_serve_what_training_asks_of_them():
    served = load_config(ServeConfig, FOLDER / "serve.yaml").rollout
    trained = load_config(RLConfig, FOLDER / "math_rl.yaml").rollout
    assert served == trained.model_copy(update={"num_servers": 8})


@pytest.mark.parametrize("name", ["curate_math", "curate_code"])
def test_curation_is_a_config(name):
    config = load_config(CurateConfig, FOLDER / f"{name}.yaml")
    assert config.pass_rate.above == 0.5


@pytest.mark.parametrize("name", ["math_rl", "code_rl"])
def test_the_best_checkpoint_stays(name):
    config = load_config(RLConfig, FOLDER / f"{name}.yaml")
    assert config.evaluation.every % config.export_every == 0
    assert config.policy.checkpoint.keep_every % config.save_every == 0


@pytest.mark.parametrize(
    ("name", "tokens"), [("math_rl", 4096 + 32768), ("code_rl", 4096 + 32768), ("eval", 81920)]
)
def test_a_server_runs_as_many_sequences_as_its_cache_holds_half_done(name, tokens):
    config = load_config(EvalConfig if name == "eval" else RLConfig, FOLDER / f"{name}.yaml")
    planned = plan_servers(
        PlannedModel(QWEN3_8B),
        read_hardware("h100"),
        servers=1,
        tensor_parallel=config.rollout.tensor_parallel_size,
        memory_fraction=config.rollout.mem_fraction_static,
        max_running=config.rollout.max_running_requests,
        element=2,
        responses=1024,
        prompt_tokens=0,
        response_tokens=tokens,
    )
    held = planned.cache_bytes / planned.cache_bytes_per_token / (tokens / 2)
    assert 0.9 * held < config.rollout.max_running_requests <= 1.1 * held


def test_the_documented_evaluation_asks_the_documented_servers(tmp_path):
    text = (FOLDER.parents[1] / "docs" / "evaluation.md").read_text()
    for block in re.findall(r"```yaml\n# (\w+\.yaml\n.*?)```", text, re.DOTALL):
        name, _, content = block.partition("\n")
        (tmp_path / name).write_text(content)
    served = load_config(ServeConfig, tmp_path / "serve.yaml")
    asking = load_config(EvalConfig, tmp_path / "eval.yaml")
    assert asking.model == served.model
    rollout = served.rollout
    ports = range(rollout.port, rollout.port + rollout.num_servers)
    assert asking.rollout.urls == [f"http://{rollout.host}:{port}" for port in ports]


@pytest.mark.parametrize("name", ["variants", "small"])
def test_every_ablation_compares_runs_that_change_a_config_that_exists(name):
    folder = FOLDER.parent / "ablations"
    overrides = import_module(str(folder / "run.py"), "test").overrides
    variants = yaml.safe_load((folder / f"{name}.yaml").read_text().replace("{data}", "data"))
    configs: dict[str, type[RunConfig]] = {"sft": SFTConfig, "rl": RLConfig}
    shared = variants.get("shared", {})
    runs = [
        load_config(config, folder / f"{verb}.yaml", overrides({**shared.get(verb, {}), **changes}))
        for verb, config in configs.items()
        for changes in variants[verb].values()
    ]
    assert len(set(map(str, runs))) == len(runs), "two runs are the same"
    compared = {run for names in variants["ablations"].values() for run in names}
    assert compared == variants["sft"].keys() | variants["rl"].keys()
