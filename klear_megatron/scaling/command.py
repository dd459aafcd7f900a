"""The verb `scaling` of the command line."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from klear_megatron.config import load_config
from klear_megatron.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("config", type=Path, help="YAML file of an experiment")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tables", action="store_true", help="measure nothing; draw the points with a result"
    )
    what.add_argument(
        "--point",
        type=int,
        metavar="N",
        help="under torchrun or srun: measure the point with this number, from 0, and nothing else",
    )
    parser.epilog = (
        "The file's keys are described in klear_megatron/scaling/config.py (ScalingConfig); "
        "examples/long_context has files to start from. Any key can be set with --section.key "
        "value. An experiment that is started again keeps the points that have a result."
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs an experiment, or as one rank a point of it.

    Raises:
        UserError: a bad config, or a point that cannot be.
    """
    from klear_megatron.scaling.config import ScalingConfig, points

    config = load_config(ScalingConfig, arguments.config, overrides)
    if arguments.point is None:
        if "RANK" in os.environ:
            raise UserError("scaling starts the ranks of each point itself: leave out torchrun")
        from klear_megatron.scaling.run import run_experiment, write_results

        if arguments.tables:
            write_results(config, points(config))
        else:
            run_experiment(config)
        return
    found = points(config)
    if not 0 <= arguments.point < len(found):
        raise UserError(f"--point {arguments.point}: there are points 0 to {len(found) - 1}")
    from klear_megatron.scaling.measure import measure_point

    measure_point(config, found[arguments.point])
