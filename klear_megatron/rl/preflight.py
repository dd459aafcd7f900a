"""Checks a run before its prompts are read and encoded, which may take long."""

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data.files import check_paths
from klear_megatron.evaluation.preflight import check_rewards
from klear_megatron.losses import PolicyObjective
from klear_megatron.platform import objects
from klear_megatron.rl.config import RLConfig
from klear_megatron.rollout.servers import check_startable
from klear_megatron.training import run


def check_before_reading(config: RLConfig, folder: ModelFolder) -> None:
    """Checks what needs no data, ranks or servers.

    Raises:
        UserError: the loss or a reward function cannot be used, or there are no such data.
    """
    PolicyObjective(config.loss)
    check_rewards(folder.tokenizer, config.rewards)
    benchmarks = config.evaluation.benchmarks.values() if config.evaluation is not None else ()
    for data in (config.data, *benchmarks):
        check_paths(data.path, data.subset, data.split)


def check_servers(config: RLConfig) -> None:
    """Collective. Checks on the first rank that it can start servers.

    Raises:
        UserError: it cannot.
    """

    def check() -> None:
        if run.is_main_rank() and not config.rollout.urls:
            check_startable(config.rollout, own_weights=True)

    objects.together(check)
