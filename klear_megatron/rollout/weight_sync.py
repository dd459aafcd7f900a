"""Gives the trainer's weights to the SGLang servers.

Each rank that puts full tensors together broadcasts them in buckets to all ranks of all servers.
While a bucket is sent, the next one is put together and the last one is loaded. The servers' end is
`server_side.klear_weight_loader`.
"""

import collections
import socket
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from klear_megatron.platform import objects
from klear_megatron.platform.tensors import PlacedTensor
from klear_megatron.rollout.config import RolloutConfig
from klear_megatron.rollout.weight_buckets import cut
from klear_megatron.rollout.weight_control import WeightControl
from klear_megatron.rollout.weight_sender import Meeting, WeightSender, WeightSyncError


class WeightSync:
    """The trainer's connection with all servers; a context manager. Collective.

    Each rank that puts tensors together is in a process group with all ranks of all servers. Rank 0
    also asks the servers to receive. After a server has restarted, new groups are made.

    Args:
        tensors: all of the model with their Hugging Face names, in the order of the streams.
    """

    def __init__(
        self, urls: Sequence[str], config: RolloutConfig, tensors: Sequence[PlacedTensor]
    ) -> None:
        buckets = cut(tensors, config.sync_bucket_bytes)
        self._buckets = [bucket for bucket in buckets if bucket.rank == dist.get_rank()]
        self._sender: WeightSender | None = None
        # Servers on this host's loopback do not tell the address by which other hosts reach it.
        _, *others = dict.fromkeys(objects.all_gather(socket.gethostname()))
        towards = f"http://{others[0]}" if others else urls[0]
        self._control = None
        if dist.get_rank() == 0:
            self._control = WeightControl(urls, towards, config, buckets)

    def __enter__(self) -> "WeightSync":
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave()
        if self._control is not None:
            self._control.close()

    def push(self, stream: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Replaces the servers' weights. No request sees a part of the new ones.

        Running requests are interrupted and continue afterwards with the new weights.

        Args:
            stream: the full tensors that this rank puts together.
            version: the servers' name for the new weights; responses carry it.

        Raises:
            WeightSyncError: on all ranks. A server refused, failed or does not report the version.
                Servers may then hold a part of the new weights and stay paused: end the run or push
                again.
        """
        control = self._control
        try:
            objects.together(lambda: control.begin() if control else None)
            meeting = objects.broadcast(control.meeting if control else None)
            assert meeting is not None
            objects.together(lambda: self._send(stream, meeting))
            objects.together(lambda: control.finish(version) if control else None)
        except WeightSyncError:
            self._leave()
            if control is not None:
                control.give_up()
            raise

    def _send(self, stream: Iterator[tuple[str, Tensor]], meeting: Meeting) -> None:
        try:
            if self._buckets:
                if self._sender is None or self._sender.meeting != meeting:
                    self._leave()
                    failure = self._control.failure if self._control else lambda: None
                    self._sender = WeightSender(meeting, self._buckets, failure)
                self._sender.send(stream)
        finally:
            # Ranks may be waiting for shards of this one's, or to send it theirs.
            collections.deque(stream, maxlen=0)

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.leave()
            self._sender = None
