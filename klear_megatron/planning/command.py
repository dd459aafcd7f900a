"""The verb `plan`: its arguments, and what it prints."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from klear_megatron.config import load_config
from klear_megatron.config.imports import add_imports, import_module
from klear_megatron.planning.hardware import Hardware, read_hardware
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.plan import plan
from klear_megatron.planning.report import (
    describe_cost,
    describe_plan,
    describe_rl,
    describe_search,
    rl_step_seconds,
)
from klear_megatron.planning.run import PlannedRun
from klear_megatron.planning.search import search
from klear_megatron.planning.servers import ServerPlan, plan_servers
from klear_megatron.policy.config import import_extensions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("config", type=Path, help="YAML file of an SFT or RL run")
    parser.add_argument("--gpus", type=_positive, required=True, help="ranks of the trainer")
    parser.add_argument(
        "--gpu", default="h100", help="h100, h200, a100, b200, gb200, or a YAML file"
    )
    parser.add_argument("--sequence-length", type=_positive, help="by default, the longest allowed")
    parser.add_argument(
        "--sequences-per-step", type=_positive, help="of one optimizer step; by default the run's"
    )
    parser.add_argument("--search", action="store_true", help="all layouts that fit, by time")
    parser.add_argument("--price", type=float, help="of a GPU hour")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_imports(parser)
    parser.epilog = "Any key of the config can be set with --section.key value."


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def run(
    arguments: argparse.Namespace, overrides: Sequence[str], judge: Callable[[bool], object]
) -> None:
    """Prints the plan.

    Args:
        judge: reads the whole config, of an RL run or of an SFT run, and refuses a bad one.

    Raises:
        UserError: a bad config, an unknown GPU or model, a layout that cannot be, or sequences
            beyond the model's positions.
    """
    config = load_config(PlannedRun, arguments.config, overrides)
    if config.needs_judging:
        judge(config.rl)
    hardware = read_hardware(arguments.gpu)
    for module in arguments.imports:
        import_module(module, "--import")
    import_extensions(config.policy)
    model = PlannedModel.read(config.policy.hf_folder)
    work = config.work(model.positions, arguments.sequence_length, arguments.sequences_per_step)
    gpus, reference = arguments.gpus, config.has_reference
    if arguments.search:
        found = search(
            config.policy, work, gpus=gpus, hardware=hardware, model=model, reference=reference
        )
        if arguments.json:
            print(json.dumps([planned.as_json() for planned in found.fitting], indent=1))
        else:
            print("\n".join(describe_search(found)))
        return
    planned = plan(
        config.policy, work, gpus=gpus, hardware=hardware, model=model, reference=reference
    )
    if arguments.json:
        print(json.dumps(planned.as_json(), indent=1))
        return
    lines = list(describe_plan(planned))
    seconds = planned.seconds.total
    if config.rl:
        servers = servers_of(config, model, hardware)
        lines += describe_rl(config, planned, servers)
        seconds = sum(rl_step_seconds(config, planned, servers).values())
        gpus += config.rollout.servers * config.rollout.tensor_parallel_size
    lines += describe_cost(gpus, seconds, config.steps, arguments.price)
    print("\n".join(lines))


def servers_of(config: PlannedRun, model: PlannedModel, hardware: Hardware) -> ServerPlan:
    """The plan of an RL run's servers."""
    rollout = config.rollout
    return plan_servers(
        model,
        hardware,
        servers=rollout.servers,
        tensor_parallel=rollout.tensor_parallel_size,
        memory_fraction=rollout.mem_fraction_static,
        max_running=rollout.max_running_requests,
        element=4 if rollout.dtype == "float32" else 2,
        responses=config.responses,
        prompt_tokens=config.data.max_prompt_length,
        response_tokens=config.sampling.max_response_length,
    )
