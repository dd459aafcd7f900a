"""Grading many responses at once, each within its time limit."""

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from klear_megatron.errors import UserError
from klear_megatron.rewards.config import MathRewardConfig, RewardConfig
from klear_megatron.rewards.math import Reward, math_reward, score_response

Job = tuple[str, str, str | list[str]]
"""data_source, response, ground truth."""

_VERIFIERS = {"math_longcot_math_verify": math_reward}


class RewardPool:
    """Processes that grade responses; a context manager that starts and stops them.

    An answer that takes longer than its time limit costs the process that verifies it, which is
    replaced, and the answer counts as wrong. So does one that makes its process crash; `crashes`
    counts those. The processes end with the one that started them, however that ends.

    `grade` may be called from any thread, and from several at once.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._restart = threading.Lock()
        self.crashes = 0

    def __enter__(self) -> "RewardPool":
        self._pool = self._start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.stop()
        self._pool.join()

    def grade(
        self, jobs: Sequence[Job], on_done: Callable[[int], None] | None = None
    ) -> list[Reward]:
        """The rewards of the jobs, in their order.

        `on_done(i)` is called in this thread as job i is finished, in any order.

        Raises:
            UserError: no verifier is known for a job's data_source.
            RuntimeError: the processes cannot be started, or were all killed.
        """
        check_data_sources(data_source for data_source, _, _ in jobs)
        pool = self._running_pool()
        finished: queue.SimpleQueue[ProcessFuture[Reward]] = queue.SimpleQueue()
        job_of_future: dict[ProcessFuture[Reward], int] = {}
        for i, (data_source, response, ground_truth) in enumerate(jobs):
            arguments = _verifier(data_source), response, ground_truth, self._config.math
            future = pool.schedule(_grade_within_limit, args=arguments)
            job_of_future[future] = i
            future.add_done_callback(finished.put)  # type: ignore[arg-type]
        rewards: dict[int, Reward] = {}
        while len(rewards) < len(jobs):
            future = _next_finished(finished, pool)
            i = job_of_future[future]
            rewards[i] = self._result(future, response=jobs[i][1])
            if on_done is not None:
                on_done(i)
        return [rewards[i] for i in range(len(jobs))]

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._config.workers,
            initializer=_prepare_worker,
            # A forked copy of a process that has threads or a CUDA context may hang.
            context=multiprocessing.get_context("spawn"),
        )
        pool.schedule(int)  # any job: pebble starts its workers with the first one
        return pool

    def _running_pool(self) -> ProcessPool:
        with self._restart:
            # A worker killed while none has work, by the kernel for want of memory for instance,
            # is the end of a pebble pool.
            if not self._pool.active:
                self._pool.stop()
                self._pool.join()
                self._pool = self._start()
            return self._pool

    def _result(self, future: "ProcessFuture[Reward]", response: str) -> Reward:
        try:
            return future.result()
        except ProcessExpired as death:
            timed_out = death.exitcode == -signal.SIGALRM
            self.crashes += not timed_out
            return score_response(response, self._config.math, correct=False, timed_out=timed_out)


def check_data_sources(data_sources: Iterable[str]) -> None:
    """Raises UserError where there is no verifier for one of them."""
    for data_source in data_sources:
        _verifier(data_source)


def _verifier(data_source: str) -> Callable[[str, str | list[str], MathRewardConfig], Reward]:
    # Benchmarks are named after the verifier: math_longcot_math_verify_aime2024.
    for name, verifier in _VERIFIERS.items():
        if data_source == name or data_source.startswith(f"{name}_"):
            return verifier
    raise UserError(
        f"data_source {data_source!r}: no verifier is known for it; "
        f"known ones: {', '.join(sorted(_VERIFIERS))}"
    )


def _next_finished(
    finished: "queue.SimpleQueue[ProcessFuture[Reward]]", pool: ProcessPool
) -> "ProcessFuture[Reward]":
    while True:
        try:
            return finished.get(timeout=1.0)
        except queue.Empty:
            # A pool that broke forgets the jobs it had not yet handed out.
            if not pool.active:
                raise RuntimeError(
                    "the processes that grade answers could not be started or were all killed; "
                    "see their messages above, and check the memory of this host"
                ) from None


def _prepare_worker() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    math_reward("<think></think>\\boxed{1}", "1")  # imports the rest of sympy


def _grade_within_limit(
    verifier: Callable[[str, str | list[str], MathRewardConfig], Reward],
    response: str,
    ground_truth: str | list[str],
    config: MathRewardConfig,
) -> Reward:
    # The kernel ends this process at the limit: nothing running in it could be relied on to do so,
    # as a long integer operation lets no other thread or signal handler run, and the process that
    # started it may be gone by then.
    signal.setitimer(signal.ITIMER_REAL, config.timeout_s)
    try:
        return verifier(response, ground_truth, config)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
