"""Draws and grades groups on a thread of its own, while the trainer trains."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from klear_megatron.data import LoadedPrompts
from klear_megatron.platform import stop
from klear_megatron.rl.buffer import Buffer, Slot
from klear_megatron.rl.groups import Group, GroupMaker
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rollout import Response, ServersLostError


@dataclass(frozen=True)
class Taken:
    """What a step takes from the buffer."""

    slots: list[Slot[Group]]
    """All graded, trained on or not."""
    carried_over: int
    """Prompts whose responses are not finished and go on beside the step."""
    idle_s: float
    """Seconds without a request in flight since the last step took its groups."""


class Producer:
    """Fills the buffer of one leader; a context manager that ends its thread.

    The thread starts with the first `wait`, when the servers have weights. It draws with whatever
    version they have; weights may be pushed at any time.
    """

    def __init__(
        self,
        prompts: LoadedPrompts,
        servers: PolicyServers,
        maker: GroupMaker,
        buffer: Buffer[Group],
    ) -> None:
        self.buffer = buffer
        self.rows: deque[int] = deque()
        """The prompts to ask next."""
        self.changed = threading.Condition()
        """Is held by whoever reads or changes the two above."""
        self._prompts = prompts
        self._servers = servers
        self._maker = maker
        self._grading: set[Slot[Group]] = set()
        self._idle = _IdleTime()
        self._failure: BaseException | None = None
        self._ended = False
        self._thread: threading.Thread | None = None
        self._drawing: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    def __enter__(self) -> "Producer":
        return self

    def __exit__(self, *exception: object) -> None:
        with self.changed:
            self._ended = True
            thread = self._thread
            if self._drawing is not None:
                loop, task = self._drawing
                loop.call_soon_threadsafe(task.cancel)
        if thread is not None:
            thread.join()

    def wait(self) -> None:
        """Returns when the next step can take its groups.

        Raises:
            ServersLostError: all servers are lost. When they are back, call it again.
            UserError: a server refused a request, or a reward function failed.
            Stopped: this process was told to stop.
        """
        with self.changed:
            if isinstance(self._failure, ServersLostError):
                self._failure = None
            if self._thread is None and self._failure is None:
                self._thread = threading.Thread(target=self._run, name="producer", daemon=True)
                self._thread.start()
            while not self.buffer.ready:
                stop.check()  # before a failure: servers are told to end, too
                if self._failure is not None:
                    raise self._failure
                self.changed.wait(stop.LOOK_AGAIN_S)

    def take(self) -> Taken:
        """The groups of the next step, for which `wait` has waited."""
        with self.changed:
            return Taken(self.buffer.take(), self.buffer.unfinished, self._idle.take())

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            asyncio.run(self._draw())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            failure = error
        with self.changed:
            # At once: whoever sees the failure of this thread may want another one.
            self._thread = None
            if failure is not None:
                self._fail(failure)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self._failure = error
            self.changed.notify_all()

    async def _draw(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        with self.changed:
            if self._ended:
                return
            self._drawing = asyncio.get_running_loop(), task
            # Those that were in flight when all servers were lost, or a checkpoint was saved.
            unfinished = [slot for slot in self.buffer.slots if slot.group is None]
            again = deque(slot for slot in unfinished if slot not in self._grading)
            self._idle.restart()
        asked: list[Slot[Group]] = []
        generator = self._servers.generator
        assert generator is not None  # a leader has one
        try:
            await self._maker.drawing(
                generator,
                self._next_prompts(again, asked),
                lambda position, responses: self._grade(asked[position], responses),
            )
        finally:
            with self.changed:
                self._drawing = None

    def _next_prompts(
        self, again: deque[Slot[Group]], asked: list[Slot[Group]]
    ) -> Iterator[Sequence[int] | None]:
        """Endless token ids, and None while there is nothing to ask; `asked` gets the slots."""
        while True:
            with self.changed:
                self.buffer.advance(self._servers.version)
                slot = again.popleft() if again else None
                if slot is None and self.rows and self.buffer.has_room:
                    slot = self.buffer.ask(self.rows.popleft())
                if slot is not None:
                    asked.append(slot)
                    self._idle.begin()
            yield None if slot is None else self._prompts.token_ids[slot.row]

    def _grade(self, slot: Slot[Group], responses: list[Response]) -> None:
        prompt, token_ids = self._prompts.prompts[slot.row], self._prompts.token_ids[slot.row]
        with self.changed:
            self._grading.add(slot)
            self._idle.end()

        def settle(graded: Future[Group]) -> None:
            if graded.cancelled():
                return
            if (error := graded.exception()) is not None:
                self._fail(error)
                return
            group = graded.result()
            with self.changed:
                self._grading.discard(slot)
                self.buffer.settle(slot, group, informative=group.informative)
                self.changed.notify_all()

        self._maker.grade(prompt, token_ids, responses).add_done_callback(settle)


class _IdleTime:
    """The seconds without a request in flight."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def restart(self) -> None:
        self._count()
        self._in_flight = 0

    def begin(self) -> None:
        self._count()
        self._in_flight += 1

    def end(self) -> None:
        self._count()
        self._in_flight -= 1

    def take(self) -> float:
        """The seconds since the last call."""
        self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self) -> None:
        now = time.perf_counter()
        if not self._in_flight:
            self._seconds += now - self._since
        self._since = now
