"""`klear-megatron convert IN OUT`: the direction follows from what IN is."""

import argparse
from pathlib import Path

from klear_megatron.errors import UserError

_ANY = "Hugging Face folder, Megatron checkpoint, or a run's folder, for its latest checkpoint"


def checkpoint_in(path: Path) -> Path:
    """The path itself, or of a run's folder its latest complete checkpoint, which is said.

    Raises:
        UserError: a run without one.
    """
    if not (path / "checkpoints").is_dir():
        return path
    from klear_megatron.policy.checkpoint import latest_checkpoint

    latest = latest_checkpoint(path)
    if latest is None:
        raise UserError(f"{path}: no complete checkpoint under checkpoints/")
    print(f"{path}: its latest checkpoint is {latest.name}")
    return latest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("checkpoint", type=Path, help=_ANY)
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
        metavar="N",
        help="to Megatron only: store tensors in N pieces, one per tensor-parallel rank that will "
        "load them; every layout loads every checkpoint, this saves reading (default: 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")


def run(arguments: argparse.Namespace) -> None:
    """Converts.

    Raises:
        UserError: `--tp` to Hugging Face; see also `megatron_to_hf` and `hf_to_megatron`.
    """
    from klear_megatron.conversion.convert import hf_to_megatron, megatron_to_hf
    from klear_megatron.conversion.megatron_reader import is_megatron_checkpoint

    options = {
        "dtype": arguments.dtype,
        "shard_bytes": int(arguments.shard_size * 1e9),
        "dry_run": arguments.dry_run,
        "resume": arguments.resume,
    }
    source = checkpoint_in(arguments.checkpoint)
    if not is_megatron_checkpoint(source):
        tp = 1 if arguments.tp is None else arguments.tp
        hf_to_megatron(source, arguments.out, tensor_parallel_size=tp, **options)
    elif arguments.tp is None:
        megatron_to_hf(source, arguments.out, **options)
    else:
        raise UserError(
            f"--tp {arguments.tp}: {source} becomes a Hugging Face folder, which is not cut for "
            "tensor parallelism; leave --tp away"
        )


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("a", type=Path, help=_ANY)
    parser.add_argument("b", type=Path, help="another, of either kind")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="compare Megatron's logits with transformers' as well; needs one of each kind, and "
        "memory for one model at a time in float32",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="with --logits, instead of random tokens; can be given several times",
    )


def verify(arguments: argparse.Namespace) -> None:
    """Compares two checkpoints.

    Raises:
        SystemExit: with status 1 after a table of what differs.
        UserError: one of them cannot be read, or `--prompt` without `--logits`.
    """
    from klear_megatron.conversion.verify import differences

    if arguments.prompt and not arguments.logits:
        raise UserError("--prompt: is for --logits; give both")
    a, b = checkpoint_in(arguments.a), checkpoint_in(arguments.b)
    rows = list(differences(a, b))
    width = max((len(name) for name, _ in rows), default=0)
    for name, what in rows:
        print(f"{name:{width}}  {what}")
    print(f"{len(rows)} tensors differ" if rows else "all tensors are the same in every bit")
    same = not rows
    if arguments.logits:
        from klear_megatron.conversion.logits import TOLERANCE, logits_difference

        difference = logits_difference(a, b, arguments.prompt)
        print(f"logits: relative difference {difference:.2g}, at most {TOLERANCE} is the same")
        same &= difference <= TOLERANCE
    if not same:
        raise SystemExit(1)


def add_release_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `release`."""
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one of its checkpoints")
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
        checkpoint_in(arguments.checkpoint),
        arguments.out,
        licence=arguments.licence,
        dtype=arguments.dtype,
        yarn=arguments.yarn,
    )
