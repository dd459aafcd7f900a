"""`klear-megatron convert IN OUT`: the direction follows from what IN is."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("checkpoint", type=Path, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("out", type=Path, help="folder to write, in the other format")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the output; as the input by default",
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest output file (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")


def run(arguments: argparse.Namespace) -> None:
    """Converts.

    Raises:
        UserError: see `megatron_to_hf` and `hf_to_megatron`.
    """
    from klear_megatron.conversion.convert import hf_to_megatron, megatron_to_hf
    from klear_megatron.conversion.megatron_reader import is_megatron_checkpoint

    megatron = is_megatron_checkpoint(arguments.checkpoint)
    convert = megatron_to_hf if megatron else hf_to_megatron
    convert(
        arguments.checkpoint,
        arguments.out,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.shard_size * 1e9),
        dry_run=arguments.dry_run,
        resume=arguments.resume,
    )
