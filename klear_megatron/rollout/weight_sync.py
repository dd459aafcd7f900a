"""Broadcasting the trainer's weights to the SGLang servers."""

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
    """The servers' weights are not, or not all, the trainer's."""


class WeightSync:
    """A process group of this process (rank 0) and every rank of every server; a context manager.

    Of the trainer, only the process that streams the full weights has one. The group is made anew
    when a server has been started again.
    """

    def __init__(self, urls: Sequence[str], config: RolloutConfig) -> None:
        self._urls = urls
        self._config = config
        self._timeout = timedelta(seconds=config.sync_timeout_s)
        timeout = httpx.Timeout(config.sync_timeout_s, connect=30)
        self._http = httpx.Client(timeout=timeout, limits=FRESH_CONNECTIONS)
        # One thread a server, so that all of them receive a bucket at the same time.
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
        """Replaces the servers' weights, all or none of them seen by any request.

        Requests under way are taken back, and go on afterwards with the new weights.

        Args:
            named_tensors: every tensor of the model under its Hugging Face name, as a stream.
            version: what the servers call the new weights; responses carry it.

        Raises:
            WeightSyncError: a server refused, failed or does not report the version. Servers may
                hold a part of the new weights then, and stay paused: end the run, or push again.
        """
        if self._group is None or any(v != self._version for v in self._versions().values()):
            self._join()
        # Until all of it has been done, nobody knows what the servers have.
        self._version = None
        self._everywhere("/pause_generation", {"mode": "retract"})
        self._everywhere("/flush_cache")
        try:
            self._everywhere("/begin_weight_update")
            for bucket in _buckets(named_tensors, self._config.sync_bucket_bytes):
                self._broadcast(bucket, version)
        except WeightSyncError:
            # While this session is open, no other push could begin.
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
        """URL -> the version that the server calls its weights; one that was started again does not
        know the last one that was sent."""
        answers = {url: self._request("GET", f"{url}/model_info") for url in self._urls}
        return {url: answer.json().get("weight_version") for url, answer in answers.items()}

    def _ranks(self, url: str) -> int:
        """The ranks of a server, which may be started with another size than the config has."""
        size: int = self._request("GET", f"{url}/server_info").json()["tp_size"]
        return size

    def _join(self) -> None:
        """Makes the group, with all servers."""
        self._leave()
        host = _address_towards(self._urls[0])
        sizes = [self._ranks(url) for url in self._urls]
        world_size = 1 + sum(sizes)
        listener = socket.create_server((host, 0))
        # The store owns the listening socket from here on.
        store = TCPStore(
            host,
            listener.getsockname()[1],
            world_size,
            is_master=True,
            timeout=self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        # Servers may still know earlier groups, of this run or of others.
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
        """Ends this process's part of the group. The servers' parts end with it, or with them: they
        would wait for each other if one of them was gone."""
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
            # A server that refuses never joins the broadcast, which then would not end either.
            while not sent.is_completed():
                if any(_has_failed(answer) for answer in answers):
                    return
                time.sleep(0.001)
            sent.wait()

    @contextlib.contextmanager
    def _explained_by(self, answers: Sequence[Future[httpx.Response]]) -> Iterator[None]:
        """Around what the servers take part in: where it fails, their answers tell why.

        Raises:
            WeightSyncError: a server's answer, or else torch's reason.
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
        # The one that failed first tells why; others may only have waited for it in vain.
        for answer in sorted(answers, key=lambda answer: not _has_failed(answer)):
            answer.result()


def _has_failed(answer: Future[httpx.Response]) -> bool:
    return answer.done() and answer.exception() is not None


def _address_towards(url: str) -> str:
    """This host's address as the server at `url` sees it: loopback for one on loopback."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def _join_group(store: Store, world_size: int, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """Rank 0 of a group beside the default one, as SGLang's `init_custom_process_group` makes it.

    PyTorch has no public function for a group whose ranks have no default group in common.
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
