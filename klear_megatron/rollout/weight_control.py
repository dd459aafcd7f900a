"""What rank 0 asks the servers before, while and after weights are sent."""

import base64
import contextlib
import io
import json
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from klear_megatron.rollout.config import RolloutConfig
from klear_megatron.rollout.server_side import WEIGHT_LOADER
from klear_megatron.rollout.servers import FRESH_CONNECTIONS
from klear_megatron.rollout.weight_buckets import Bucket, describe
from klear_megatron.rollout.weight_sender import Meeting, WeightSyncError


class WeightControl:
    """Asks the servers to receive weights, and makes the meeting with the senders.

    Args:
        towards: the URL of a server or another host that has to reach the meeting.
        buckets: of all senders.
    """

    def __init__(
        self, urls: Sequence[str], towards: str, config: RolloutConfig, buckets: Sequence[Bucket]
    ) -> None:
        self.meeting: Meeting | None = None
        self._urls = urls
        self._towards = towards
        self._buckets = buckets
        self._timeout_s = config.sync_timeout_s
        # All buckets are sent within one request.
        timeout = httpx.Timeout(config.sync_timeout_s * (len(buckets) + 1), connect=30)
        self._http = httpx.Client(timeout=timeout, limits=FRESH_CONNECTIONS)
        # One thread per server, so that all receive a bucket at the same time.
        self._threads = ThreadPoolExecutor(len(urls), thread_name_prefix="weight-sync")
        self._receiving: list[Future[httpx.Response]] = []
        self._version: str | None = None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def begin(self) -> None:
        """Pauses the servers and asks them to receive.

        Raises:
            WeightSyncError: a server does not answer.
        """
        known = self.meeting is not None and self._version is not None
        if not known or any(v != self._version for v in self._versions().values()):
            self._meet()
        # Unknown until the push is complete.
        self._version = None
        self._everywhere("/pause_generation", {"mode": "retract"})
        self._everywhere("/flush_cache")
        self._everywhere("/begin_weight_update")
        self._receiving = self._start("/update_weights_from_tensor", self._bodies)

    def failure(self) -> str | None:
        """What a server that has refused or failed said, while weights are sent."""
        failed = [answer.exception() for answer in self._receiving if answer.done()]
        return next((str(error) for error in failed if error is not None), None)

    def finish(self, version: int) -> None:
        """Lets the servers generate with the weights that they have received.

        Raises:
            WeightSyncError: a server has not loaded them, or does not report the version.
        """
        assert self.meeting is not None
        wait(self._receiving, self._timeout_s)
        if failure := self.failure():
            raise WeightSyncError(failure)
        for url, answer in zip(self._urls, self._receiving, strict=True):
            if not answer.done():
                raise WeightSyncError(
                    f"{url} did not load the weights within {self._timeout_s:.0f} s "
                    "(rollout.sync_timeout_s)"
                )
        store = self.meeting.store()
        if store.check(["failure"]):
            raise WeightSyncError(store.get("failure").decode())
        self._everywhere("/end_weight_update")
        named = {"new_version": str(version), "abort_all_requests": False}
        self._everywhere("/update_weight_version", named)
        self._everywhere("/flush_cache")
        self._everywhere("/continue_generation")
        for url, found in self._versions().items():
            if found != str(version):
                raise WeightSyncError(
                    f"{url} reports weight version {found!r} after version {version} was sent"
                )
        self._version = str(version)

    def give_up(self) -> None:
        """Makes the servers ready for another push; those that are lost cannot be."""
        self.meeting = None
        # No other push could begin while this update is open.
        with contextlib.suppress(WeightSyncError):
            self._everywhere("/end_weight_update")

    def _meet(self) -> None:
        """Makes a new meeting; the servers learn of it when they are asked to receive."""
        host = _address_towards(self._towards)
        sizes = [self._ranks(url) for url in self._urls]
        listener = socket.create_server((host, 0))
        timeout = timedelta(seconds=self._timeout_s)
        # The store owns the listening socket from now on.
        self._store = TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        group = f"klear_megatron_{time.time_ns()}"
        size = 1 + sum(sizes)
        self.meeting = Meeting(host, self._store.port, group, size, self._timeout_s)
        self.meeting.store().set("layout", json.dumps(describe(self._buckets, size)))
        ranks = iter(range(1, size))
        self._bodies = [
            {
                "serialized_named_tensors": [
                    _invitation(self.meeting, url, next(ranks)) for _ in range(size)
                ],
                "load_format": WEIGHT_LOADER,
                "flush_cache": False,
            }
            for url, size in zip(self._urls, sizes, strict=True)
        ]

    def _versions(self) -> dict[str, str | None]:
        """URL -> the server's weight version. A server that restarted by itself does not report the
        last pushed one."""
        answers = {url: self._request("GET", f"{url}/model_info") for url in self._urls}
        return {url: answer.json().get("weight_version") for url, answer in answers.items()}

    def _ranks(self, url: str) -> int:
        """The ranks of a server, which may be started with another size than the config has."""
        size: int = self._request("GET", f"{url}/server_info").json()["tp_size"]
        return size

    def _everywhere(self, path: str, body: dict[str, Any] | None = None) -> None:
        answers = self._start(path, [body or {}] * len(self._urls))
        # Report the server that has already failed; the others may only be waiting for it.
        wait(answers, return_when="FIRST_EXCEPTION")
        for answer in sorted(answers, key=lambda one: not (one.done() and one.exception())):
            answer.result()

    def _start(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Future[httpx.Response]]:
        return [
            self._threads.submit(self._request, "POST", f"{url}{path}", body)
            for url, body in zip(self._urls, bodies, strict=True)
        ]

    def _request(self, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self._http.request(method, url, json=body)
        except httpx.TransportError as error:
            raise WeightSyncError(f"{url}: {str(error) or type(error).__name__}") from error
        refused = (
            answer.headers.get("content-type", "").startswith("application/json")
            and answer.json().get("success") is False
        )
        if answer.status_code != httpx.codes.OK or refused:
            raise WeightSyncError(f"{url} answered {answer.status_code}: {answer.text[:500]}")
        return answer


def _invitation(meeting: Meeting, url: str, rank: int) -> str:
    """What `klear_weight_loader` gets on one rank of a server: a list of named tensors, as SGLang
    reads it. Its one tensor is empty and has the invitation for a name.

    Args:
        rank: of the server's rank in the groups.
    """
    data = io.BytesIO()
    text = json.dumps(asdict(meeting) | {"url": url, "rank": rank})
    ForkingPickler(data).dump([(text, torch.empty(0))])
    return base64.b64encode(data.getvalue()).decode()


def _address_towards(url: str) -> str:
    """This host's address as the server at `url` sees it: loopback if the server is on loopback."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        address: str = probe.getsockname()[0]
        return address
