"""Ends a run that hangs, with a report of which rank waits where."""

import contextlib
import faulthandler
import json
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from klear_megatron.platform import heartbeat
from klear_megatron.platform.exit_codes import FAILED
from klear_megatron.platform.files import write_atomically
from klear_megatron.platform.torchrun import LastWords

_LOOK_EVERY_S = 10.0
_WRITE_S = 2.0
"""Enough to write the stacks, on a busy host."""
_KEY = "klear_megatron/heartbeats"


class Watchdog:
    """A context manager; all ranks have one.

    Ranks wait for each other, so progress of any of them counts for all: those that wait for a long
    generation are not ended. When no rank makes progress for `timeout_s`, each writes the stacks of
    its threads to `hang/rank_N.txt` in the run directory and ends with code 1. A rank whose threads
    cannot run does the same a little later, through a timer that does not need the interpreter.

    The main rank also keeps `heartbeat.json`: the last trained step, the phase, and the time of the
    last progress of any rank.

    Args:
        timeout_s: None to keep `heartbeat.json` only.
    """

    def __init__(self, run_dir: Path, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._every_s = min(_LOOK_EVERY_S, timeout_s / 10) if timeout_s else _LOOK_EVERY_S
        self._grace_s = 2 * self._every_s + _WRITE_S
        self._heartbeat = run_dir / "heartbeat.json"
        self._report = run_dir / "hang" / f"rank_{dist.get_rank():05}.txt"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout_s is not None:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            # What an earlier start of the run has left there is kept.
            self._file = self._report.open("a")
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join(self._every_s)
        if self._timeout_s is not None:
            faulthandler.cancel_dump_traceback_later()
            if not self._report.stat().st_size:
                self._report.unlink()
                with contextlib.suppress(OSError):  # other ranks' reports are there
                    self._report.parent.rmdir()

    def _watch(self) -> None:
        # The store ends with the rank or torchrun that keeps it; the timer is left then.
        with contextlib.suppress(RuntimeError):
            self._compare_with_store()

    def _compare_with_store(self) -> None:
        store = _get_default_store()
        mine, everyone, since = -1, -1, time.monotonic()
        while not self._ended.is_set():
            if heartbeat.beats != mine:
                mine = heartbeat.beats
                store.add(_KEY, 1)
            if (now := store.add(_KEY, 0)) != everyone:
                everyone, since = now, time.monotonic()
                self._note_progress()
            elif self._timeout_s is not None and time.monotonic() - since > self._timeout_s:
                self._end()
            self._ended.wait(self._every_s)

    def _note_progress(self) -> None:
        if dist.get_rank() == 0:
            now = {"step": heartbeat.step, "phase": heartbeat.phase, "time": time.time()}
            with write_atomically(self._heartbeat) as file:
                json.dump(now, file)
        if self._timeout_s is not None:
            # When the others have written theirs, and before their end has this rank killed.
            later = self._timeout_s + self._grace_s
            faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def _end(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        message = (
            f"no rank has made progress for {self._timeout_s:.0f} s (watchdog_s), after step "
            f"{heartbeat.step}; the stacks of all ranks are in {self._report.parent}"
        )
        print(f"in phase {heartbeat.phase}; {message}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file)
        LastWords(message, FAILED).leave()
        time.sleep(self._grace_s)  # until the others have written theirs
        os._exit(FAILED)
