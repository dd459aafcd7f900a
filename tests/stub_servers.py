"""HTTP servers in place of SGLang's, to see what reaches them: they stand for the network.

They answer /generate with the same token to everyone, after a time that the test chooses.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class StubServer:
    """One server; `places` requests are at work at a time, and others wait for them."""

    places: int
    prompts: list[list[int]] = field(default_factory=list)
    """All that were asked."""
    waiting: int = 0
    working: int = 0
    url: str = ""


class StubServers:
    """Servers on one event loop; `seen` is called after each change of their load.

    Args:
        generate: gets a request's prompt, and returns the log-probabilities to answer with when
            the answer is due. A ConnectionError closes the connection without an answer.
        tokens: that each server says its KV cache has room for.
    """

    def __init__(
        self,
        count: int,
        places: int,
        generate: Callable[[list[int]], Awaitable[list[float | None]]],
        seen: Callable[[list[StubServer]], None] = lambda servers: None,
        tokens: int = 10**6,
    ) -> None:
        self.servers = [StubServer(places) for _ in range(count)]
        self._generate = generate
        self._seen = seen
        self.version = "0"
        """Of the weights, as responses report it."""
        self._info = {
            "dp_size": 1,
            "max_total_num_tokens": tokens,
            "internal_states": [{"effective_max_running_requests_per_dp": 10**4}],
        }

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    async def start(self) -> None:
        for server in self.servers:
            handle = self._handler(server)
            listener = await asyncio.start_server(handle, "127.0.0.1", 0)
            server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

    def _handler(self, server: StubServer) -> Any:
        free = asyncio.Semaphore(server.places)

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            with contextlib.closing(writer), contextlib.suppress(ConnectionError):
                if head.startswith("post /generate"):
                    length = int(head.split("content-length:")[1].split("\r\n")[0])
                    body = json.loads(await reader.readexactly(length))
                    writer.write(await answer(body))
                elif head.startswith("get /v1/loads"):
                    writer.write(_ok({"loads": [{"num_waiting_reqs": server.waiting}]}))
                elif head.startswith("get /server_info"):
                    writer.write(_ok(self._info))
                else:
                    writer.write(HEALTHY)
                await writer.drain()

        async def answer(body: dict[str, Any]) -> bytes:
            server.prompts.append(body["input_ids"])
            server.waiting += 1
            async with free:
                server.waiting -= 1
                server.working += 1
                self._seen(self.servers)
                try:
                    log_probs = await self._generate(body["input_ids"])
                finally:
                    server.working -= 1
            self._seen(self.servers)
            return _answer(log_probs, self.version, body["sampling_params"]["n"])

        return handle


def _answer(log_probs: list[float | None], version: str, count: int) -> bytes:
    output = {
        "meta_info": {
            "finish_reason": {"type": "stop"},
            "weight_version": version,
            "output_token_logprobs": [[log_prob, 1, None] for log_prob in log_probs],
        }
    }
    return _ok([output] * count if count > 1 else output)


def _ok(value: Any) -> bytes:
    body = json.dumps(value).encode()
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def running(servers: StubServers) -> Iterator[StubServers]:
    """On a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def end_requests() -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)

    try:
        asyncio.run_coroutine_threadsafe(servers.start(), loop).result(10)
        yield servers
    finally:
        asyncio.run_coroutine_threadsafe(end_requests(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
