"""Several ranks under torchrun, with the message and the exit code of the one that failed first.

torchrun ends with a traceback of its own and with code 1, whatever its ranks said. But it names an
error file for each rank. Ranks leave their last words there, and `run` reads them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klear_megatron.platform.exit_codes import BAD_INPUT, CONTINUE, FINISHED, INTERRUPTED
from klear_megatron.platform.first_rank import is_first_to_report

if TYPE_CHECKING:  # importing torch takes seconds, and a mistake in a config is told before
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_LAUNCHER = "KLEAR_MEGATRON_TORCHRUN"
"""Set for the ranks of `run`."""


@dataclass(frozen=True)
class LastWords:
    """Why a process ends.

    Args:
        code: its exit code.
        rank: the rank that found out; None outside of torchrun and Slurm.
    """

    message: str
    code: int
    rank: int | None = None

    def say(self) -> None:
        if self.code in (CONTINUE, INTERRUPTED):
            text = self.message
        else:
            where = "" if self.rank is None else f" on rank {self.rank}"
            text = f"error{where}: {self.message}"
        print(text, file=sys.stderr, flush=True)

    def leave(self) -> None:
        """Says them, once for all ranks that say the same: at once, or under `run` when all ranks
        have ended."""
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file:
            words = {**asdict(self), "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": words}), encoding="utf-8")
        if not (file and _LAUNCHER in os.environ) and is_first_to_report(self.message):
            self.say()


def run(arguments: Sequence[str], check: Callable[[Sequence[str]], object]) -> int:
    """torchrun for the verbs of this package.

    Args:
        arguments: torchrun's options, then a verb with its own arguments; `-m klear_megatron` may
            stand between them, as torchrun itself wants it.
        check: called with the verb and its arguments before a rank is started.

    Returns:
        the exit code of the rank that failed first, whose message is the last thing that is said;
        128 + N for a rank that signal N ended; 2 if the ranks cannot meet.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    options = torchrun.parse_args(["--module", *arguments])
    if options.training_script != "klear_megatron":
        options.training_script_args.insert(0, options.training_script)
        options.training_script = "klear_megatron"
    check(options.training_script_args)
    os.environ[_LAUNCHER] = "1"
    begin = time.time()
    with tempfile.TemporaryDirectory(prefix="klear_megatron_") as folder:
        options.log_dir = options.log_dir or folder
        try:
            torchrun.run(options)
            return FINISHED
        except ChildFailedError as error:
            last = _words_of(*error.get_first_failure())
        except (DistNetworkError, RendezvousError) as error:
            where = "--master-addr and --master-port, or --rdzv-endpoint"
            last = LastWords(f"{where}: the ranks cannot meet there: {error}", BAD_INPUT)
        except SignalException as error:
            told = LastWords(f"ended by {error.sigval.name}", 128 + error.sigval)
            last = next(iter(_read_all(Path(options.log_dir), begin)), told)
        others = {words.message: words for words in _read_all(Path(options.log_dir), begin)}
    others.pop(last.message, None)
    for words in [*others.values(), last]:
        words.say()
    return last.code


def _words_of(rank: int, failure: ProcessFailure) -> LastWords:
    """What the rank said last, or how it ended if it said nothing."""
    if isinstance(failure.message, dict):
        return _read(failure.message)
    if failure.exitcode < 0:
        return LastWords(f"killed by {failure.signal_name()}", 128 - failure.exitcode, rank)
    what = f"ended with code {failure.exitcode}; what it said is above"
    return LastWords(what, failure.exitcode, rank)


def _read_all(folder: Path, begin: float) -> list[LastWords]:
    """What ranks of this host have said last since `begin`, in the order in which they said it."""
    files = sorted((file.stat().st_mtime, file) for file in folder.rglob("error.json"))
    return [
        _read(json.loads(file.read_text(encoding="utf-8"))["message"])
        for changed, file in files
        if changed >= begin
    ]


def _read(words: dict[str, Any]) -> LastWords:
    return LastWords(words["message"], words["code"], words["rank"])
