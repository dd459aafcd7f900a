"""Broadcasts the trainer's weights to the SGLang servers."""

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from klear_megatron.errors import UserError
from klear_megatron.platform.device import BACKEND
from klear_megatron.rollout.config import RolloutConfig
from klear_megatron.rollout.servers import FRESH_CONNECTIONS


class WeightSyncError(UserError):
    """At least one server does not have the trainer's weights."""


class WeightSync:
    """A process group of this process (rank 0) and every rank of every server; a context manager.

    Only the trainer's rank that holds the stream of full weights has one. After a server has
    restarted, a new group is made.
    """

    def __init__(self, urls: Sequence[str], config: RolloutConfig) -> None:
        self._urls = urls
        self._config = config
        self._timeout = timedelta(seconds=config.sync_timeout_s)
        timeout = httpx.Timeout(config.sync_timeout_s, connect=30)
        self._http = httpx.Client(timeout=timeout, limits=FRESH_CONNECTIONS)
        # One thread per server, so that all receive a bucket at the same time.
        self._threads = ThreadPoolExecutor(len(urls), thread_name_prefix="weight-sync")
        self._group: dist.ProcessGroup | None = None
        self._version: str | None = None

    def __enter__(self) -> "WeightSync":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()
        self._leave()

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the servers' weights. No request sees a part of the new ones.

        Running requests are interrupted and continue afterwards with the new weights.

        Args:
            named_tensors: a stream of every tensor of the model with its Hugging Face name.
            version: the servers' name for the new weights; responses carry it.

        Raises:
            WeightSyncError: a server refused, failed or does not report the version. Servers may
                then hold a part of the new weights and stay paused: end the run or push again.
        """
        if self._group is None or any(v != self._version for v in self._versions().values()):
            self._join()
        # Unknown until the push is complete.
        self._version = None
        self._everywhere("/pause_generation", {"mode": "retract"})
        self._everywhere("/flush_cache")
        try:
            self._everywhere("/begin_weight_update")
            for bucket in _buckets(named_tensors, self._config.sync_bucket_bytes):
                self._broadcast(bucket, version)
        except WeightSyncError:
            # No other push could begin while this update is open.
            with contextlib.suppress(WeightSyncError):
                self._everywhere("/end_weight_update")
            raise
        self._everywhere("/end_weight_update")
        self._everywhere("/flush_cache")
        self._everywhere("/continue_generation")
        for url, found in self._versions().items():
            if found != str(version):
                raise WeightSyncError(
                    f"{url} reports weight version {found!r} after version {version} was sent"
                )
        self._version = str(version)

    def _versions(self) -> dict[str, str | None]:
        """URL -> the server's weight version. A server that restarted by itself does not report the
        last pushed one."""
        answers = {url: self._request("GET", f"{url}/model_info") for url in self._urls}
        return {url: answer.json().get("weight_version") for url, answer in answers.items()}

    def _ranks(self, url: str) -> int:
        """The ranks of a server, which may be started with another size than the config has."""
        size: int = self._request("GET", f"{url}/server_info").json()["tp_size"]
        return size

    def _join(self) -> None:
        """Makes the group with all servers."""
        self._leave()
        host = _address_towards(self._urls[0])
        sizes = [self._ranks(url) for url in self._urls]
        world_size = 1 + sum(sizes)
        listener = socket.create_server((host, 0))
        # The store owns the listening socket from now on.
        store = TCPStore(
            host,
            listener.getsockname()[1],
            world_size,
            is_master=True,
            timeout=self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        # Unique, because servers may still know groups of earlier runs.
        self._group_name = f"klear_megatron_{time.time_ns()}"
        bodies = [
            {
                "master_address": host,
                "master_port": store.port,
                "rank_offset": 1 + sum(sizes[:index]),
                "world_size": world_size,
                "group_name": self._group_name,
                "backend": BACKEND,
            }
            for index in range(len(self._urls))
        ]
        answers = self._start("/init_weights_update_group", bodies)
        with self._explained_by(answers):
            self._group = _join_group(store, world_size, self._group_name, self._timeout)

    def _leave(self) -> None:
        """Leaves the group. The servers are not asked to leave: they would wait for each other, and
        one of them may be gone."""
        if self._group is not None:
            self._group.abort()
            dist.destroy_process_group(self._group)
            self._group = None

    def _broadcast(self, bucket: list[tuple[str, Tensor]], version: int) -> None:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._group_name,
            "weight_version": str(version),
            "flush_cache": False,
            "load_format": "flattened_bucket",
        }
        data = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
        answers = self._start("/update_weights_from_distributed", [body] * len(self._urls))
        with self._explained_by(answers):
            sent = dist.broadcast(data, src=0, group=self._group, async_op=True)
            assert sent is not None
            # A server that refuses never joins the broadcast, which then would never end.
            while not sent.is_completed():
                if any(_has_failed(answer) for answer in answers):
                    return
                time.sleep(0.001)
            sent.wait()

    @contextlib.contextmanager
    def _explained_by(self, answers: Sequence[Future[httpx.Response]]) -> Iterator[None]:
        """Wraps a collective with the servers: if it fails, their answers explain why.

        Raises:
            WeightSyncError: with a server's answer, or with torch's reason if no server has one.
        """
        failure = None
        try:
            yield
        except RuntimeError as error:
            failure = error
        self._finish(answers)
        if failure is not None:
            raise WeightSyncError(f"{', '.join(self._urls)}: {failure}") from failure

    def _everywhere(self, path: str, body: dict[str, Any] | None = None) -> None:
        self._finish(self._start(path, [body or {}] * len(self._urls)))

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

    def _finish(self, answers: Sequence[Future[httpx.Response]]) -> None:
        # Report the server that has already failed; the others may only be waiting for it.
        for answer in sorted(answers, key=lambda answer: not _has_failed(answer)):
            answer.result()


def _has_failed(answer: Future[httpx.Response]) -> bool:
    return answer.done() and answer.exception() is not None


def _address_towards(url: str) -> str:
    """This host's address as the server at `url` sees it: loopback if the server is on loopback."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def _join_group(store: Store, world_size: int, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """Joins as rank 0 a group beside the default one, made as SGLang's
    `init_custom_process_group` makes it.

    PyTorch has no public function for a group of ranks without a common default group.
    """
    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        Backend(BACKEND),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _buckets(
    named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
