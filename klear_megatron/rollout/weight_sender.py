"""Broadcasts one rank's share of the weights to all ranks of all servers."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from klear_megatron.errors import UserError
from klear_megatron.platform.device import this_device
from klear_megatron.rollout.server_side.klear_weight_loader import make_group
from klear_megatron.rollout.weight_buckets import Bucket

_EXPLANATION_S = 2.0
"""After a connection has broken, a server's answer may still say why."""


class WeightSyncError(UserError):
    """At least one server does not have the trainer's weights."""


@dataclass(frozen=True)
class Meeting:
    """Where senders and servers find each other: a TCP store, and the prefix of its keys."""

    host: str
    port: int
    group: str
    """Unique, because servers may still know groups of earlier runs."""
    group_size: int
    """One sender and all ranks of all servers."""
    timeout_s: float

    def store(self) -> PrefixStore:
        timeout = timedelta(seconds=self.timeout_s)
        client = TCPStore(self.host, self.port, is_master=False, timeout=timeout)
        return PrefixStore(self.group, client)


class WeightSender:
    """Rank 0 of a process group with the servers.

    Args:
        buckets: those of this rank.
        failure: why the servers cannot take the weights, as soon as this rank knows a reason.

    Raises:
        WeightSyncError: a server does not join.
    """

    def __init__(
        self, meeting: Meeting, buckets: Sequence[Bucket], failure: Callable[[], str | None]
    ) -> None:
        self.meeting = meeting
        self._buckets = buckets
        self._failure = failure
        self._store = meeting.store()
        # While one is sent, the other is filled.
        self._memory = [
            torch.empty(
                max((bucket.size for bucket in some), default=0),
                dtype=torch.uint8,
                device=this_device(),
            )
            for some in (buckets[0::2], buckets[1::2])
        ]
        # Making the group would wait in vain for a server that failed before.
        here = [f"here/{rank}" for rank in range(1, meeting.group_size)]
        self._wait(lambda: self._store.check(here))
        timeout = timedelta(seconds=meeting.timeout_s)
        with self._explaining():  # one may be lost after it has come
            self._group = make_group(
                self._store, dist.get_rank(), 0, meeting.group_size, timeout, this_device()
            )

    def send(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        """Sends this rank's buckets in order, filled from the stream.

        Raises:
            WeightSyncError: a server failed, or another sender knows that one did.
        """
        under_way: list[dist.Work] = []
        with self._explaining():
            for number, bucket in enumerate(self._buckets):
                if len(under_way) == len(self._memory):
                    self._finish(under_way.pop(0))
                data = self._memory[number % 2]
                for place, (name, tensor) in zip(bucket.places, stream, strict=False):
                    assert name == place.name, f"{name} instead of {place.name}"
                    place.of(data).copy_(tensor)
                under_way.append(self._group.broadcast(data[: bucket.size], 0))
            for work in under_way:
                self._finish(work)

    def leave(self) -> None:
        """Ends what is under way. The servers are not asked to leave: they would wait for each
        other, and one of them may be gone."""
        self._group.abort()

    def _finish(self, work: dist.Work) -> None:
        # A server that failed never joins the broadcast, which then would never end.
        self._wait(work.is_completed)
        work.wait()

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.meeting.timeout_s
        while not done():
            if failure := self._known_failure():
                raise WeightSyncError(failure)
            if time.monotonic() > deadline:
                raise WeightSyncError(
                    f"a server did not take weights within {self.meeting.timeout_s:.0f} s "
                    "(rollout.sync_timeout_s)"
                )
            time.sleep(0.001)

    def _known_failure(self) -> str | None:
        """What this rank, another sender or a server knows."""
        if failure := self._failure():
            self._store.set("failure", failure)
        if self._store.check(["failure"]):
            return str(self._store.get("failure").decode())
        return None

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """An error of the process group becomes the failure of a server that explains it."""
        try:
            yield
        except RuntimeError as error:
            deadline = time.monotonic() + _EXPLANATION_S
            while not (failure := self._known_failure()) and time.monotonic() < deadline:
                time.sleep(0.01)
            raise WeightSyncError(failure or str(error)) from error
