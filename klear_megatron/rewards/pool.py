"""Grading many responses at once, each within its time limit."""

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from pebble import CONSTS, ProcessExpired, ProcessPool

from klear_megatron.rewards.answers import agrees, math_answer
from klear_megatron.rewards.config import RewardConfig
from klear_megatron.rewards.graders import (
    CustomGrader,
    Grader,
    check_data_sources,
    combine,
    graders_of,
    verifier_of,
)
from klear_megatron.rewards.limits import prepare_process, reached, run_within
from klear_megatron.rewards.reward import Job, Reward, with_block

T = TypeVar("T")

# Seconds until a worker that is not needed any more is killed: it ignores SIGTERM.
CONSTS.term_timeout = 0.1


class RewardPool:
    """Processes that grade responses; a context manager that starts and stops them.

    If grading an answer reaches a time limit, its process is killed and replaced, and the answer
    counts as wrong. The same happens if its process crashes; `crashes` counts those. The processes
    end with the one that started them, however it ends. The user's async functions run in one
    thread of this process, many at the same time.

    `grade` may be called from any thread, and from several at once.

    Args:
        sharers: the pools on this host, this one included, among which the config's `workers` and
            `max_concurrent` are divided; each gets at least one.
    """

    def __init__(self, config: RewardConfig, sharers: int = 1) -> None:
        self._config = config
        self._workers = max(1, config.workers // sharers)
        self._max_concurrent = max(1, config.max_concurrent // sharers)
        self._lock = threading.Lock()
        self._ended = False
        self.crashes = 0

    def __enter__(self) -> "RewardPool":
        self._pool = self._start()
        self._loop = asyncio.new_event_loop()
        self._calls = asyncio.Semaphore(self._max_concurrent)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._ended = True
        self._pool.stop()
        self._pool.join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def grade(
        self, jobs: Sequence[Job], on_done: Callable[[int], None] | None = None
    ) -> list[Reward]:
        """The rewards of the jobs, in their order.

        `on_done(i)` is called in this thread when job i is finished, in any order.

        Raises:
            UserError: a job cannot be graded: its data_source has no verifier, its verifier does
                not run on this host, its ground truth has no tests, or a function of the user's
                failed or returned no finite score.
            RuntimeError: the processes cannot be started, or were all killed.
        """
        jobs = [replace(job, thinking=self._config.thinking) for job in jobs]
        check_data_sources((job.data_source for job in jobs), self._config)
        pool = self._running_pool()
        graders = [graders_of(job.data_source, self._config) for job in jobs]
        job_of_future = {
            self._schedule(pool, grader, job): (i, j)
            for i, job in enumerate(jobs)
            for j, grader in enumerate(graders[i])
        }
        grades: list[dict[int, Reward]] = [{} for _ in jobs]
        for future in _as_finished(job_of_future, pool):
            i, j = job_of_future[future]
            grades[i][j] = self._result(future, graders[i][j], response=jobs[i].whole)
            if on_done is not None and len(grades[i]) == len(graders[i]):
                on_done(i)
        return [
            combine(graders[i], [grade[j] for j in range(len(graders[i]))])
            for i, grade in enumerate(grades)
        ]

    def is_math(self, data_source: str) -> bool:
        """Whether the math verifier judges this data source."""
        return verifier_of(data_source, self._config.sources) == "math"

    def read_answers(self, responses: Sequence[str]) -> list[str | None]:
        """The answer in each response to a mathematical problem, for comparing them.

        None stands for no answer, or none that can be read within the limits of `math`.

        Raises:
            RuntimeError: the processes cannot be started, or were all killed.
        """
        pool = self._running_pool()
        limits = self._config.math.limits
        futures: list[Future[str | None]] = [
            pool.schedule(
                run_within,
                args=(limits, math_answer, with_block(response, self._config.thinking)),
            )
            for response in responses
        ]
        for _ in _as_finished(futures, pool):
            pass
        return [
            None if isinstance(future.exception(), ProcessExpired) else future.result()
            for future in futures
        ]

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._workers,
            initializer=_prepare_worker,
            # A forked copy of a process that has threads or a CUDA context may hang.
            context=multiprocessing.get_context("spawn"),
        )
        pool.schedule(int)  # any job: pebble starts its workers with the first one
        return pool

    def _running_pool(self) -> ProcessPool:
        with self._lock:
            if self._ended:
                raise RuntimeError("the processes that grade answers have been ended")
            # A pebble pool stops if a worker is killed while none has work, for instance by the
            # kernel when memory runs out.
            if not self._pool.active:
                self._pool.stop()
                self._pool.join()
                self._pool = self._start()
            return self._pool

    def _schedule(self, pool: ProcessPool, grader: Grader, job: Job) -> "Future[Reward]":
        if isinstance(grader, CustomGrader) and grader.is_async:
            call = self._call_within_limit(grader, job)
            return asyncio.run_coroutine_threadsafe(call, self._loop)
        future: Future[Reward] = pool.schedule(run_within, args=(grader.limits, grader.grade, job))
        return future

    async def _call_within_limit(self, grader: CustomGrader, job: Job) -> Reward:
        async with self._calls:
            return await asyncio.wait_for(grader.grade_async(job), grader.limits.wall_s)

    def _result(self, future: "Future[Reward]", grader: Grader, response: str) -> Reward:
        try:
            return future.result()
        except ProcessExpired as death:
            timed_out = reached(death.exitcode)
            with self._lock:
                self.crashes += not timed_out
            return grader.failed(response, timed_out=timed_out)
        except TimeoutError:
            return grader.failed(response, timed_out=True)


def _as_finished(futures: Collection["Future[T]"], pool: ProcessPool) -> Iterator["Future[T]"]:
    finished: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    left = len(futures)
    while left:
        try:
            yield finished.get(timeout=1.0)
            left -= 1
        except queue.Empty:
            # A pool that broke forgets the jobs it had not yet handed out.
            if not pool.active:
                raise RuntimeError(
                    "the processes that grade answers could not be started or were all killed; "
                    "see their messages above, and check the memory of this host"
                ) from None


def _prepare_worker() -> None:
    prepare_process()
    agrees("\\boxed{1}", "1")  # imports the rest of sympy
