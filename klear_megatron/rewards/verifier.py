"""A process that compares mathematical answers, for callers that have no pool of them.

math-verify may evaluate a number without end, which nothing in the same process can interrupt.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from klear_megatron.rewards.answers import agrees
from klear_megatron.rewards.limits import Limits, prepare_process, reached, run_within


class Verifier:
    """Starts the process when it is first needed, and again after one was ended by a limit.

    It may be used from any thread. The process ends with the one that started it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def agrees(self, answer: str, ground_truth: str | Sequence[str], limits: Limits) -> bool | None:
        """`answers.agrees`, but None if it reached a limit, and False if it crashed.

        Raises:
            RuntimeError: the process does not start.
        """
        question = {"answer": answer, "golds": ground_truth, "limits": vars(limits)}
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if reply:
                return bool(json.loads(reply))
            self._process = None
            status = process.wait()
        if status > 0:
            raise RuntimeError(f"the verifier ended with status {status}; see its messages above")
        return None if reached(status) else False

    def _running(self) -> "subprocess.Popen[str]":
        # A forked copy of this process must not talk to the verifier of the original.
        if self._process is None or self._owner != os.getpid():
            path = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                text=True,
            )
            self._owner = os.getpid()
        return self._process


def main() -> None:
    """Answers a question a line, each `true` or `false`."""
    prepare_process()
    for line in sys.stdin:
        question = json.loads(line)
        limits = Limits(**question["limits"])
        right = run_within(limits, agrees, question["answer"], question["golds"])
        print(json.dumps(right), flush=True)
