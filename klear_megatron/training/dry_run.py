"""What a run would do, found out without ranks, servers, weights or a run directory."""

from collections.abc import Iterator

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.config import as_yaml
from klear_megatron.errors import UserError
from klear_megatron.planning import PlannedModel, hardware_here
from klear_megatron.planning.report import refusal
from klear_megatron.platform.files import check_folder
from klear_megatron.policy.checkpoint import latest_checkpoint
from klear_megatron.training.config import RunConfig
from klear_megatron.training.planned import describe_longest, plan_longest


def describe_run(config: RunConfig, folder: ModelFolder, ranks: int) -> Iterator[str]:
    """Lines: all settings, the layout, what a step is made of, and the plan.

    Raises:
        UserError: the model or the ranks cannot be divided as the config says, or the run does not
            fit this host's memory.
    """
    if config.trackers is not None:
        config.trackers.check_installed()
    check_folder(config.run_dir)
    parallel = config.policy.parallel
    parallel.check_model(folder)
    data_parallel = parallel.data_parallel_size(ranks)
    yield as_yaml(config)
    yield (
        f"ranks: {ranks} = TP {parallel.tensor_model_parallel_size} x PP "
        f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP "
        f"{data_parallel}"
    )
    yield from config.describe_step(data_parallel)
    yield _describe_plan(config, ranks)
    if newest := latest_checkpoint(config.run_dir):
        yield f"the run would go on from {newest}"


def _describe_plan(config: RunConfig, ranks: int) -> str:
    try:
        hardware = hardware_here()
    except UserError as error:
        return f"no plan: {error}"
    model = PlannedModel.read(config.policy.hf_folder)
    planned = plan_longest(config, model, hardware, ranks)
    if not planned.fits and not config.start_without_room:
        raise UserError(refusal(planned))
    return f"{describe_longest(planned)}, on GPUs or cores like this host's"
