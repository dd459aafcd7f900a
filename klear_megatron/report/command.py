"""The verb `report`: its arguments, and what it prints."""

import argparse
from pathlib import Path

from klear_megatron.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run_dir, a folder of several, or a .json file of `plan --json`",
    )
    parser.add_argument("--out", type=Path, help="the file to write; by default RUN/report.html")
    parser.add_argument(
        "--rollouts", type=int, default=2000, help="responses to look through (default 2000)"
    )
    parser.add_argument("--price", type=float, help="of a GPU hour, for the account")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and says where it is.

    Raises:
        UserError: a path holds no run, or a run's files cannot be read.
    """
    from klear_megatron.report.page import write_report

    first = arguments.runs[0]
    folder = first.parent if first.suffix == ".json" else first
    out = arguments.out or folder / "report.html"
    if arguments.rollouts < 0:
        raise UserError(f"--rollouts {arguments.rollouts}: give 0 or more")
    write_report(arguments.runs, out, rollouts=arguments.rollouts, price=arguments.price)
    print(f"the report is {out}; open it in a browser")
