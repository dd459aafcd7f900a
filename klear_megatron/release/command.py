"""`klear-megatron release CHECKPOINT OUT`."""

import argparse
from pathlib import Path

from klear_megatron.config.imports import add_imports
from klear_megatron.conversion.command import check_alone, check_output, checkpoint_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="folder to publish")
    add_imports(parser)
    parser.add_argument(
        "--licence",
        "--license",
        required=True,
        help="the hub's identifier of the licence, such as apache-2.0; it is not checked",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="dtype of the weights (default: as trained)",
    )
    parser.add_argument(
        "--yarn",
        action="store_true",
        help="extend the context with YaRN: factor 2.5 over 32768 tokens",
    )
    parser.add_argument(
        "--evaluation",
        action="append",
        type=Path,
        default=[],
        metavar="RUN_DIR",
        help="run_dir of `klear-megatron eval`, for the model card; may be given several times",
    )


def run(arguments: argparse.Namespace) -> None:
    """Makes a folder to publish.

    Raises:
        UserError: see `klear_megatron.release.release.release`.
    """
    from klear_megatron.release.release import release

    check_alone("release")
    checkpoint = checkpoint_in(arguments.checkpoint, arguments.imports)
    check_output(checkpoint, arguments.out)
    release(
        checkpoint,
        arguments.out,
        licence=arguments.licence,
        dtype=arguments.dtype,
        yarn=arguments.yarn,
        evaluations=arguments.evaluation,
    )
