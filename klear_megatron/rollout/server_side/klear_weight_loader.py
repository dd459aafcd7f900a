"""Receives a trainer's weights in an SGLang server, from `klear_megatron.rollout.weight_sync`.

Code for the servers' interpreter, named to them by `--custom-weight-loader`. SGLang calls `load` on
every rank of a server, with the model and a list of named tensors. Here the list has one empty
tensor, whose name is a JSON object that says where to meet the trainer.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    Work,
)

_receivers: dict[str, "_Receiver"] = {}
"""At most one, by the name of its group: that of the trainer whose weights came last."""


def load(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Loads all weights that the trainer sends into `model`.

    What fails is written to the trainer's store: SGLang ends a server whose loader raises.
    """
    ((text, _),) = named_tensors
    meeting = json.loads(text)
    timeout = timedelta(seconds=meeting["timeout_s"])
    store = TCPStore(meeting["host"], meeting["port"], is_master=False, timeout=timeout)
    group = PrefixStore(meeting["group"], store)
    try:
        if meeting["group"] not in _receivers:
            _receivers.clear()
            device = next(model.parameters()).device
            _receivers[meeting["group"]] = _Receiver(group, meeting["rank"], timeout, device)
        for named in _receivers[meeting["group"]].receive():
            model.load_weights(named)
        # The next broadcast overwrites what the device may still be copying from.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        _receivers.clear()
        group.set("failure", f"{meeting['url']} cannot load the weights: {error}")


class _Receiver:
    """Receives the buckets of a layout, as often as they are sent, into the same memory.

    Args:
        store: has the trainer's `layout`.
        rank: of this process in each group of one sender and all ranks of all servers.
    """

    def __init__(self, store: Store, rank: int, timeout: timedelta, device: torch.device) -> None:
        layout = json.loads(store.get("layout"))
        self._buckets = layout["buckets"]
        # While one is loaded, the other receives.
        self._memory = [
            torch.empty(
                max((one["size"] for one in some), default=0), dtype=torch.uint8, device=device
            )
            for some in (self._buckets[0::2], self._buckets[1::2])
        ]
        store.set(f"here/{rank}", "")
        self._groups = {
            sender: make_group(store, sender, rank, layout["group_size"], timeout, device)
            for sender in layout["senders"]
        }

    def receive(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The tensors of each bucket, by name. They are overwritten after the next bucket."""
        arriving = [self._start(0)]
        for number, bucket in enumerate(self._buckets):
            if number + 1 < len(self._buckets):
                arriving.append(self._start(number + 1))
            arriving.pop(0).wait()
            data = self._memory[number % 2]
            yield [(place["name"], _tensor_at(place, data)) for place in bucket["places"]]

    def _start(self, number: int) -> Work:
        bucket = self._buckets[number]
        data = self._memory[number % 2][: bucket["size"]]
        return self._groups[bucket["sender"]].broadcast(data, 0)


def _tensor_at(place: dict[str, Any], data: Tensor) -> Tensor:
    inside = data[place["begin"] : place["begin"] + place["size"]]
    return inside.view(getattr(torch, place["dtype"])).view(place["shape"])


def make_group(
    store: Store,
    sender: int,
    rank: int,
    size: int,
    timeout: timedelta,
    device: torch.device,
) -> Any:
    """Joins a group beside torch's default one, which the trainer and the servers do not share: a
    ProcessGroupGloo on a CPU, else a ProcessGroupNCCL. Torch's types lack most of their methods.

    Args:
        sender: rank 0 of this group, by its rank in the trainer's own.
    """
    own = PrefixStore(f"from {sender}", store)
    if device.type == "cpu":
        return ProcessGroupGloo(own, rank, size, timeout)
    from torch.distributed import ProcessGroupNCCL  # not in builds of torch without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(own, rank, size, options)
