"""The command line: `klear-megatron VERB ...`.

Each verb imports what it needs when it runs, so that a mistake in its arguments is reported at once
and not after the seconds that Megatron-Core takes to import.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from klear_megatron.config import Section, load_config
from klear_megatron.config.reference import list_references, read_reference
from klear_megatron.conversion import command as conversion
from klear_megatron.errors import Stopped, UserError
from klear_megatron.launch import command as launching
from klear_megatron.planning import command as planning
from klear_megatron.platform.exit_codes import BAD_INPUT, CONTINUE, FINISHED, INTERRUPTED
from klear_megatron.platform.files import write_atomically
from klear_megatron.platform.torchrun import LastWords
from klear_megatron.platform.torchrun import run as run_ranks
from klear_megatron.release import command as release
from klear_megatron.report import command as reporting
from klear_megatron.rl import show
from klear_megatron.scaling import command as scaling

C = TypeVar("C", bound=Section)
_NEAR = 0.85
"""How similar to an option of a verb a mistyped one is, and a setting is not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        one of `platform.exit_codes`: 0 on success; 2 after bad input and 130 after Ctrl-C, with one
        message on standard error; 75 if training was told to stop and can go on.
    """
    parsed = _parse(sys.argv[1:] if arguments is None else arguments)
    _silence_libraries()
    try:
        parsed.run(parsed)
    except Stopped as stopped:
        last = LastWords(str(stopped), CONTINUE)
    except UserError as error:
        last = LastWords(str(error), BAD_INPUT, _rank_of(error))
    except KeyboardInterrupt:
        last = LastWords("interrupted", INTERRUPTED)
    else:
        return FINISHED
    # torchrun sends SIGTERM as soon as one rank has failed; this one may be about to speak.
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    last.leave()
    signal.signal(signal.SIGTERM, handler)
    return last.code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its arguments. Ends the process, as argparse does, where they are wrong."""
    parsed, rest = _parser().parse_known_args(_file_first(list(arguments)))
    if rest and not parsed.takes_overrides:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options = re.findall(r"--[\w-]+", parsed.usage()) if rest else []
    for argument in rest:
        near = get_close_matches(argument.partition("=")[0], options, 1, _NEAR)
        if near:
            _parser().error(f"unrecognized argument {argument}; did you mean {near[0]}?")
    parsed.overrides = rest
    return parsed


def _file_first(arguments: list[str]) -> list[str]:
    """The arguments with the file of `--config FILE`, as other trainers have it, after the verb."""
    if arguments[:1] == ["torchrun"]:  # the verb comes later, in a process of its own
        return arguments
    for i, argument in enumerate(arguments):
        option, equals, file = argument.partition("=")
        if option == "--config" and (equals or len(arguments) > i + 1):
            rest = arguments[i + 1 :] if equals else arguments[i + 2 :]
            return [*arguments[:1], file or arguments[i + 1], *arguments[1:i], *rest]
    return arguments


def _rank_of(error: UserError) -> int | None:
    """The rank that found it; None for a process that is alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    return int(os.environ["RANK"]) if error.rank is None else error.rank


def _silence_libraries() -> None:
    """Hides the warnings that Megatron-Core and torch print about themselves at every start.

    `doctor` reports which optional libraries are missing.
    """
    for module in (r"megatron\.core", r"torch\.distributed", r"klear_megatron\.platform\.cpu"):
        warnings.filterwarnings("ignore", module=module)


class _VerbParser(argparse.ArgumentParser):
    """A verb, whose help ends with all settings of its file."""

    shows_settings_of: str | None = None

    def format_help(self) -> str:
        text = super().format_help()
        if self.shows_settings_of is not None:
            text += "\n" + read_reference(self.shows_settings_of)
        return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klear-megatron", description="Klear-Reasoner training on Megatron-Core."
    )
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", required=True, parser_class=_VerbParser
    )
    for run in (_sft, _rl, _eval, _serve, _curate, _probe):
        verb = _add_verb(verbs, run, takes_overrides=True)
        verb.add_argument("config", type=Path, help="YAML file")
        name = run.__name__.removeprefix("_")
        verb.epilog = (
            f"Any key can be set with --section.key value. `klear-megatron config {name}` prints a "
            "file with all of them to start from:"
        )
        verb.shows_settings_of = name
        if run in (_sft, _rl, _eval):
            verb.add_argument("--dry-run", action="store_true", help="only say what would be done")
        if run in (_sft, _rl):
            verb.add_argument(
                "--ranks", type=_positive, help="of a --dry-run; by default torchrun's"
            )
    _add_verb(verbs, _torchrun, takes_overrides=True, add_help=False)
    _add_verb(verbs, _config).add_argument("verb", choices=list_references())
    regrade = _add_verb(verbs, _regrade, takes_overrides=True)
    regrade.add_argument("run_dir", type=Path, help="run_dir of `klear-megatron eval`")
    regrade.epilog = "The rewards of its config can be changed with --rewards.key value."
    compare = _add_verb(verbs, _compare)
    compare.add_argument("run_a", type=Path, help="run_dir of `klear-megatron eval`")
    compare.add_argument("run_b", type=Path, help="another run_dir, with the same problems")
    conversion.add_arguments(_add_verb(verbs, _convert))
    conversion.add_verify_arguments(_add_verb(verbs, _verify))
    release.add_arguments(_add_verb(verbs, _release))
    planning.add_arguments(_add_verb(verbs, _plan, takes_overrides=True))
    scaling.add_arguments(_add_verb(verbs, _scaling, takes_overrides=True))
    launching.add_arguments(_add_verb(verbs, _launch, takes_overrides=True))
    reporting.add_arguments(_add_verb(verbs, _report))
    show.add_arguments(_add_verb(verbs, _show))
    for run in (_status, _logs, _cancel):
        _add_verb(verbs, run).add_argument("run_dir", type=Path, help="run_dir of a launched run")
    _add_verb(verbs, _doctor)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _add_verb(
    verbs: Any,
    run: Callable[[argparse.Namespace], None],
    *,
    takes_overrides: bool = False,
    add_help: bool = True,
) -> "_VerbParser":
    """Adds a verb with the name and the docstring of the function that carries it out."""
    verb: _VerbParser = verbs.add_parser(
        run.__name__.removeprefix("_"),
        help=run.__doc__,
        description=run.__doc__,
        add_help=add_help,
    )
    # Options are added later.
    verb.set_defaults(run=run, takes_overrides=takes_overrides, usage=verb.format_usage)
    return verb


def _sft(arguments: argparse.Namespace) -> None:
    """Supervised fine-tuning; on several ranks by `torchrun`."""
    from klear_megatron.sft.config import SFTConfig

    config = load_config(SFTConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from klear_megatron.sft.dry_run import describe_sft

        _dry_run(describe_sft, config, arguments.ranks)
        return
    from klear_megatron.sft.loop import train_sft

    train_sft(config)


def _rl(arguments: argparse.Namespace) -> None:
    """Reinforcement learning; on several ranks by `torchrun`."""
    from klear_megatron.rl.config import RLConfig

    config = load_config(RLConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from klear_megatron.rl.dry_run import describe_rl

        _dry_run(describe_rl, config, arguments.ranks)
        return
    from klear_megatron.rl.loop import train_rl

    train_rl(config)


def _dry_run(describe: Callable[[C, int], Iterable[str]], config: C, ranks: int | None) -> None:
    """Prints what a run would do on so many ranks, by default those that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        for line in describe(config, ranks or int(os.environ.get("WORLD_SIZE", "1"))):
            print(line, flush=True)


def _torchrun(arguments: argparse.Namespace) -> None:
    """Run a verb on several ranks: torchrun's options, then the verb with its arguments."""
    sys.exit(run_ranks(arguments.overrides, _parse))


def _eval(arguments: argparse.Namespace) -> None:
    """Measure the accuracy of a Hugging Face checkpoint on benchmarks."""
    from klear_megatron.evaluation import EvalConfig

    config = load_config(EvalConfig, arguments.config, arguments.overrides)
    from klear_megatron.evaluation.evaluate import describe, evaluate

    if arguments.dry_run:
        for line in describe(config):
            print(line, flush=True)
        return
    _print_scores(evaluate(config), config.run_dir)


def _regrade(arguments: argparse.Namespace) -> None:
    """Grade the stored responses of an evaluation again, without a server."""
    from klear_megatron.evaluation.evaluate import regrade

    _print_scores(regrade(arguments.run_dir, arguments.overrides), arguments.run_dir)


def _print_scores(scores: Mapping[str, object], run_dir: Path) -> None:
    for name, of_one in scores.items():
        print(f"{name}: {of_one}")
    print(f"see {run_dir}")


def _compare(arguments: argparse.Namespace) -> None:
    """Compare two evaluations of the same problems with a paired test."""
    from klear_megatron.evaluation.compare import compare_runs, format_comparison

    print(format_comparison(compare_runs(arguments.run_a, arguments.run_b)))


def _serve(arguments: argparse.Namespace) -> None:
    """Serve a Hugging Face checkpoint with SGLang until Ctrl-C."""
    from klear_megatron.checkpoints.hub import local_model
    from klear_megatron.checkpoints.model_folder import ModelFolder
    from klear_megatron.rollout import ServeConfig, serving
    from klear_megatron.rollout.servers import reachable

    config = load_config(ServeConfig, arguments.config, arguments.overrides)
    model = local_model(config.model)
    ModelFolder(model)  # SGLang takes long to report a mistake
    logs = config.run_dir / "logs"
    with serving(config.rollout, model, logs, seed=config.seed) as servers:
        urls = [reachable(url) for url in servers.urls]
        print("\n".join(["serving; stop with Ctrl-C", *urls]), flush=True)
        if config.announce is not None:
            with write_atomically(config.announce) as file:
                json.dump(urls, file)
        while True:
            time.sleep(5)
            servers.restore()


def _curate(arguments: argparse.Namespace) -> None:
    """Choose prompts to train on: without duplicates and contamination, and hard enough."""
    from klear_megatron.curation import CurateConfig, curate

    print(curate(load_config(CurateConfig, arguments.config, arguments.overrides)))


def _probe(arguments: argparse.Namespace) -> None:
    """Measure a model with long sequences: loss by position, and finding a needle."""
    from klear_megatron.probing.config import ProbeConfig

    config = load_config(ProbeConfig, arguments.config, arguments.overrides)
    from klear_megatron.probing.probe import probe

    probe(config)


def _config(arguments: argparse.Namespace) -> None:
    """Print a YAML file with all settings of a verb, their defaults and what they do."""
    print(read_reference(arguments.verb), end="")


def _convert(arguments: argparse.Namespace) -> None:
    """Convert between Hugging Face and Megatron checkpoints."""
    conversion.run(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    """Check that two checkpoints, Hugging Face or Megatron, have the same weights."""
    conversion.verify(arguments)


def _release(arguments: argparse.Namespace) -> None:
    """Make a folder to publish from a checkpoint, and check it with transformers and SGLang."""
    release.run(arguments)


def _plan(arguments: argparse.Namespace) -> None:
    """Say whether a run fits, how fast it is, and which layouts are faster."""

    def judge(rl: bool) -> object:
        from klear_megatron.rl.config import RLConfig
        from klear_megatron.sft.config import SFTConfig

        config: type[RLConfig | SFTConfig] = RLConfig if rl else SFTConfig
        return load_config(config, arguments.config, arguments.overrides)

    planning.run(arguments, arguments.overrides, judge)


def _scaling(arguments: argparse.Namespace) -> None:
    """Measure speed and memory over sequence lengths and layouts, beside their plans."""
    scaling.run(arguments, arguments.overrides)


def _launch(arguments: argparse.Namespace) -> None:
    """Run a config as a job: on Slurm through nemo-run, or on this host."""
    from klear_megatron.curation import CurateConfig
    from klear_megatron.evaluation import EvalConfig
    from klear_megatron.rl.config import RLConfig
    from klear_megatron.rollout import ServeConfig
    from klear_megatron.scaling.config import ScalingConfig
    from klear_megatron.sft.config import SFTConfig

    configs: dict[str, type[Section]] = {
        "sft": SFTConfig,
        "rl": RLConfig,
        "serve": ServeConfig,
        "eval": EvalConfig,
        "curate": CurateConfig,
        "scaling": ScalingConfig,
    }
    launching.launch(arguments, configs)


def _report(arguments: argparse.Namespace) -> None:
    """Write a page about runs: curves, costs, rollouts and evaluations in one HTML file."""
    reporting.run(arguments)


def _show(arguments: argparse.Namespace) -> None:
    """Show the responses of a step of RL, or one of them token by token."""
    show.run(arguments)


def _status(arguments: argparse.Namespace) -> None:
    """Show the jobs of a launched run, its first error and its newest lines."""
    from klear_megatron.launch.status import status

    print(status(arguments.run_dir))


def _logs(arguments: argparse.Namespace) -> None:
    """Show the newest lines of all ranks and servers of a launched run."""
    from klear_megatron.launch.status import logs

    print(logs(arguments.run_dir))


def _cancel(arguments: argparse.Namespace) -> None:
    """Cancel the jobs of a launched run."""
    from klear_megatron.launch.status import cancel

    print(cancel(arguments.run_dir))


def _doctor(arguments: argparse.Namespace) -> None:
    """Show what is installed and what it is used for, and what is wrong."""
    from klear_megatron.doctor import examine

    problems = examine()
    if problems:
        raise UserError("\n  ".join(["found problems:", *problems]))
