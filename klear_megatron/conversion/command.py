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
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="to Megatron: store tensors in N pieces, one per tensor-parallel rank that will load "
        "them; every layout loads every checkpoint, this saves reading (default: %(default)s)",
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

    options = {
        "dtype": arguments.dtype,
        "shard_bytes": int(arguments.shard_size * 1e9),
        "dry_run": arguments.dry_run,
        "resume": arguments.resume,
    }
    if is_megatron_checkpoint(arguments.checkpoint):
        megatron_to_hf(arguments.checkpoint, arguments.out, **options)
    else:
        hf_to_megatron(
            arguments.checkpoint, arguments.out, tensor_parallel_size=arguments.tp, **options
        )


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("a", type=Path, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("b", type=Path, help="another, of either kind")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="compare Megatron's logits with transformers' as well; needs one of each kind, and "
        "memory for both models in float32",
    )


def verify(arguments: argparse.Namespace) -> None:
    """Compares two checkpoints.

    Raises:
        SystemExit: with status 1 after a table of what differs.
        UserError: one of them cannot be read.
    """
    from klear_megatron.conversion.verify import differences

    rows = list(differences(arguments.a, arguments.b))
    width = max((len(name) for name, _ in rows), default=0)
    for name, what in rows:
        print(f"{name:{width}}  {what}")
    print(f"{len(rows)} tensors differ" if rows else "all tensors are the same in every bit")
    same = not rows
    if arguments.logits:
        from klear_megatron.conversion.logits import TOLERANCE, logits_difference

        difference = logits_difference(arguments.a, arguments.b)
        print(f"logits: relative difference {difference:.2g}, at most {TOLERANCE} is the same")
        same &= difference <= TOLERANCE
    if not same:
        raise SystemExit(1)


def add_release_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `release`."""
    parser.add_argument("checkpoint", type=Path, help="Megatron checkpoint, in its run's folder")
    parser.add_argument("out", type=Path, help="folder to publish")
    parser.add_argument("--licence", required=True, help="its identifier, such as apache-2.0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="as trained by default")
    parser.add_argument(
        "--yarn",
        action="store_true",
        help="extend the context with YaRN: factor 2.5 over 32768 tokens",
    )


def release(arguments: argparse.Namespace) -> None:
    """Makes a folder to publish.

    Raises:
        UserError: see `klear_megatron.conversion.release.release`.
    """
    from klear_megatron.conversion.release import release

    release(
        arguments.checkpoint,
        arguments.out,
        licence=arguments.licence,
        dtype=arguments.dtype,
        yarn=arguments.yarn,
    )
