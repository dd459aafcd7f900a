"""`klear-megatron convert IN OUT`; the kind of IN decides the direction."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from klear_megatron.config.imports import add_imports, import_module
from klear_megatron.errors import UserError

_ANY = (
    "Hugging Face folder; Megatron checkpoint; or a run's folder or a root of Megatron-LM, Bridge "
    "or slime, for its latest checkpoint"
)


def checkpoint_in(path: Path, imports: Sequence[str] = ()) -> Path:
    """The path itself; for a run's folder or a root with a tracker, its latest complete checkpoint,
    whose name is printed. Imports `imports`, and the modules that the checkpoint's run imported.

    Raises:
        UserError: there is no complete checkpoint, `path` is a folder of runs, or a module cannot
            be imported.
    """
    from klear_megatron.checkpoints.megatron_folder import newest_in
    from klear_megatron.checkpoints.run_config import read_run_config

    if (path / "checkpoints").is_dir() or (path / "configs").is_dir():  # of a run that began
        from klear_megatron.policy.checkpoint import latest_checkpoint

        latest = latest_checkpoint(path)
        if latest is None:
            raise UserError(f"{path}: no complete checkpoint under checkpoints/")
    else:
        inside = sorted(folder.parent.name for folder in path.glob("*/checkpoints"))
        if inside and not (path / "config.json").is_file():
            raise UserError(
                f"{path}: is no run, but has some: {', '.join(inside)}; give one of them"
            )
        latest = newest_in(path)
    if latest != path and _rank() == 0:
        print(f"{path}: its latest checkpoint is {latest.name}")
    of_run = (read_run_config(latest) or {}).get("policy", {}).get("imports", ())
    for setting, modules in (("--import", imports), (f"policy.imports of {latest}", of_run)):
        for module in modules:
            import_module(module, setting)
    return latest


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def check_output(source: Path, out: Path) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out}: is inside {source}, which is read; choose another output")


def check_alone(verb: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{verb}: runs in one process; start it without torchrun")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("checkpoint", type=Path, help=_ANY)
    parser.add_argument("out", type=Path, help="folder to write, in the other format")
    add_imports(parser)
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="from Megatron only: folder with the model's config and tokenizer (default: hf/ in "
        "the checkpoint, else a config derived from its args or run_config.yaml)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the output (default: that of the input)",
    )
    parser.add_argument(
        "--shard-size",
        type=_positive,
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
    parser.add_argument(
        "--to",
        choices=["hf", "megatron"],
        help="format of the output; refuse any other (default: the one the input is not)",
    )
    parser.add_argument(
        "--layout",
        choices=["megatron-lm"],
        help="to Megatron only: a root with a tracker and the checkpoint as its `release`, which "
        "Megatron-LM's --load and Bridge take (default: the checkpoint alone)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> None:
    """Converts a checkpoint. Ctrl-C ends the process.

    Raises:
        UserError: `--tp` or `--layout` is given for an output of Hugging Face, `--hf` for an input
            of it, `--to` contradicts the input, or the output lies inside the input; see also
            `megatron_to_hf` and `hf_to_megatron`.
    """
    # An exception that Ctrl-C raises while torch writes can get lost or turn into another one.
    # Files already written survive this, as they survive a kill.
    signal.signal(signal.SIGINT, _end)
    from klear_megatron.checkpoints.megatron_folder import is_megatron_checkpoint
    from klear_megatron.conversion.convert import hf_to_megatron, megatron_to_hf

    options = {
        "dtype": arguments.dtype,
        "shard_bytes": int(arguments.shard_size * 1e9),
        "dry_run": arguments.dry_run,
        "resume": arguments.resume,
    }
    source = checkpoint_in(arguments.checkpoint, arguments.imports)
    check_output(source, arguments.out)
    direction = "hf" if is_megatron_checkpoint(source) else "megatron"
    if arguments.to not in (None, direction):
        kind = "a Megatron checkpoint" if direction == "hf" else "no Megatron checkpoint"
        raise UserError(f"--to {arguments.to}: {source} is {kind}; give one of the other kind")
    if direction == "megatron":
        if arguments.hf is not None:
            raise UserError(f"--hf: {source} is a Hugging Face folder itself; leave --hf out")
        tp = 1 if arguments.tp is None else arguments.tp
        layout = arguments.layout == "megatron-lm"
        hf_to_megatron(
            source, arguments.out, tensor_parallel_size=tp, for_megatron_lm=layout, **options
        )
    elif arguments.layout is not None:
        raise UserError(f"--layout: {source} becomes a Hugging Face folder; leave --layout out")
    elif arguments.tp is None:
        megatron_to_hf(source, arguments.out, hf=arguments.hf, **options)
    else:
        raise UserError(
            f"--tp {arguments.tp}: {source} becomes a Hugging Face folder, which is not cut for "
            "tensor parallelism; leave --tp out"
        )


def _end(*_: object) -> None:
    if _rank() == 0:
        print("interrupted; the same command with --resume goes on", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("a", type=Path, help=_ANY)
    parser.add_argument("b", type=Path, help="the other checkpoint, of either kind")
    add_imports(parser)
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
        help="with --logits: use this text, not random tokens; can be given several times",
    )


def verify(arguments: argparse.Namespace) -> None:
    """Compares two checkpoints.

    Raises:
        SystemExit: with status 1 after a table of what differs.
        UserError: a checkpoint cannot be read, or `--prompt` is given without `--logits`.
    """
    from klear_megatron.conversion.verify import compare_weights

    check_alone("verify")
    if arguments.prompt and not arguments.logits:
        raise UserError("--prompt: is for --logits; give both")
    a, b = checkpoint_in(arguments.a, arguments.imports), checkpoint_in(arguments.b)
    count, differing = compare_weights(a, b)
    width = max(map(len, differing), default=0)
    for name, what in differing.items():
        print(f"{name:{width}}  {what}")
    same = not differing
    found = f"all {count} tensors are the same in every bit"
    print(found if same else f"{len(differing)} of {count} tensors differ")
    if arguments.logits:
        from klear_megatron.conversion.logits import TOLERANCE, logits_difference

        print("computing logits of both models")
        difference, prompts, tokens = logits_difference(a, b, arguments.prompt)
        print(
            f"logits: relative difference {difference:.2g}, at most {TOLERANCE} is the same; after "
            f"{tokens} tokens of {prompts} prompts"
        )
        same &= difference <= TOLERANCE
    if not same:
        raise SystemExit(1)
