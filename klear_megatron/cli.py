"""The command line: `klear-megatron VERB ...`.

Each verb imports what it needs when it runs, so that a mistake is reported at once and not after
the seconds that Megatron-Core takes to import.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from klear_megatron.errors import UserError

_BAD_INPUT = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        0, or 2 after bad input and 130 after Ctrl-C, each with one message on standard error.
    """
    parsed, rest = _parser().parse_known_args(arguments)
    if rest and not parsed.takes_overrides:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    # What is and what is not installed is `doctor`'s to say, once.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    try:
        parsed.overrides = rest
        parsed.run(parsed)
    except UserError as error:
        # Every rank finds the same mistake; one of each host says so.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klear-megatron", description="Klear-Reasoner training on Megatron-Core."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], about: str, *, config: bool
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=about, description=about)
        verb.set_defaults(run=run, takes_overrides=config)
        if config:
            verb.add_argument("config", type=Path, help="YAML file")
            verb.epilog = "Any key of the file can be given as --section.key value."
        return verb

    add(
        "sft",
        _sft,
        "Supervised fine-tuning; start it with torchrun for several ranks.",
        config=True,
    )
    add("rl", _rl, "Reinforcement learning; start it with torchrun for several ranks.", config=True)
    add("eval", _eval, "Accuracy of a Hugging Face checkpoint on a set of problems.", config=True)
    add("serve", _serve, "Serve a Hugging Face checkpoint with SGLang until Ctrl-C.", config=True)
    add(
        "doctor",
        _doctor,
        "What is installed, what would be used for what, what is wrong.",
        config=False,
    )

    from klear_megatron.conversion import command

    convert = add(
        "convert", command.run, "Between Hugging Face and Megatron checkpoints.", config=False
    )
    command.add_arguments(convert)
    return parser


def _sft(arguments: argparse.Namespace) -> None:
    from klear_megatron.config import load_config
    from klear_megatron.trainers.config import SFTConfig

    config = load_config(SFTConfig, arguments.config, arguments.overrides)
    from klear_megatron.trainers.sft import train_sft

    train_sft(config)


def _rl(arguments: argparse.Namespace) -> None:
    from klear_megatron.config import load_config
    from klear_megatron.trainers.config import RLConfig

    config = load_config(RLConfig, arguments.config, arguments.overrides)
    from klear_megatron.trainers.rl import train_rl

    train_rl(config)


def _eval(arguments: argparse.Namespace) -> None:
    from klear_megatron.config import load_config
    from klear_megatron.evaluation import EvalConfig, evaluate

    config = load_config(EvalConfig, arguments.config, arguments.overrides)
    scores = evaluate(config)
    print(
        f"avg@{scores.samples_per_problem} over {scores.problems} problems: "
        f"{scores.accuracy:.1%} ± {scores.standard_error:.1%} (standard error); "
        f"well-formed {scores.formatted:.1%}, truncated {scores.truncated:.1%}, "
        f"{scores.length_mean:.0f} tokens a response; see {config.run_dir}"
    )


def _serve(arguments: argparse.Namespace) -> None:
    from klear_megatron.config import load_config
    from klear_megatron.rollout.config import ServeConfig
    from klear_megatron.rollout.servers import serving

    config = load_config(ServeConfig, arguments.config, arguments.overrides)
    with serving(config.rollout, config.model, config.run_dir / "logs", seed=config.seed) as urls:
        print("\n".join(["serving; stop with Ctrl-C", *urls]), flush=True)
        signal.pause()


def _doctor(arguments: argparse.Namespace) -> None:
    from klear_megatron.doctor import examine

    problems = examine()
    if problems:
        raise UserError("\n  ".join(["found problems:", *problems]))
