"""What a run of reinforcement learning would do."""

from collections.abc import Iterator

from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.evaluation import Evaluations
from klear_megatron.rl.loop import make_sampler, read_training_prompts
from klear_megatron.rl.preflight import check_before_reading
from klear_megatron.training import run
from klear_megatron.training.dry_run import describe_run


def describe_rl(config: RLConfig, ranks: int) -> Iterator[str]:
    """Lines: the settings, the plan, servers, rows read and left out, and steps.

    Raises:
        UserError: what the run itself would refuse before its servers start.
    """
    config = run.with_model_here(config)
    folder = run.model_folder(config)
    check_before_reading(config, folder)
    yield from describe_run(config, folder, ranks)
    yield config.rollout.describe_servers()
    rollout = config.rollout.model_copy(update={"urls": ()})
    alone = config.model_copy(update={"rollout": rollout})
    prompts = read_training_prompts(alone, folder)
    make_sampler(config, prompts)
    evaluations = Evaluations(alone, folder)
    drawn = config.steps * config.prompts_per_step
    yield f"data: {len(prompts.prompts)} prompts to train on"
    yield from evaluations.describe()
    yield (
        f"steps: {config.steps}, with {drawn} prompts in all: "
        f"{drawn / len(prompts.prompts):.2f} times the data; at most {config.optimizer_steps} "
        "optimizer steps"
    )
