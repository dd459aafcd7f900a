"""Drawing responses to many prompts from several SGLang servers that share the work."""

import asyncio
import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import httpx

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.platform import heartbeat, stop
from klear_megatron.rollout.clocks import Clocks
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig
from klear_megatron.rollout.dispatch import Capacity, Dispatch, Share
from klear_megatron.rollout.prompt_queue import Item, PromptQueue
from klear_megatron.rollout.requests import (
    GenerationError,
    NoAnswerError,
    Response,
    ServerLostError,
    ServersLostError,
    capacity_of,
    draw_responses,
    generates,
)
from klear_megatron.rollout.servers import FRESH_CONNECTIONS, Servers, serving

OnDone = Callable[[int, list[Response]], None]
"""Gets a prompt's position and the responses to it."""

_LOOK_AGAIN_S = 0.02
_NEWEST_WEIGHT = 0.01
"""Of the newest sequence in the mean length, once there were many."""
_ATTEMPTS = 3
"""A prompt that got no answer this often ends the run: the prompt itself may end the servers."""


class Generator:
    """Draws responses from a set of servers; `Dispatch` says which server gets which prompt.

    A prompt without an answer is asked again, from another server if the first one is lost.

    Args:
        vocab_size: token ids at or above it are refused here, because one of them ends a server.
        stop_token_ids: a response ends with the first of them.
        servers: starts a lost server again, with the weights it had. Without them a lost server is
            not used until it is removed from `lost`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        *,
        vocab_size: int,
        stop_token_ids: Sequence[int],
        servers: Servers | None = None,
    ) -> None:
        self.urls = urls
        self.config = config
        self.servers = servers
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids
        self.lost: set[str] = set()
        """Servers that do not answer, or answered with other weights than `weight_versions`. One
        that is removed is used again, also by drawing that goes on."""
        self.answered: collections.Counter[str] = collections.Counter()
        """Prompts that each server has answered since this was last emptied."""
        self.weight_versions: frozenset[str] | None = None
        """The versions that all tokens must be drawn with; None if any will do."""
        self.held = False
        """While it is set, no prompt is given to a server, because the servers get new weights."""
        self._sequence_tokens = 0.0
        self._sequences = 0

    @classmethod
    def for_model(
        cls,
        folder: ModelFolder,
        urls: Sequence[str],
        config: RolloutConfig,
        servers: Servers | None = None,
    ) -> "Generator":
        """A generator with the vocabulary and stop tokens of the model that the servers serve."""
        return cls(
            urls,
            config,
            vocab_size=folder.config.vocab_size,
            stop_token_ids=folder.stop_token_ids,
            servers=servers,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        responses_per_prompt: int = 1,
        on_done: OnDone | None = None,
    ) -> list[list[Response]]:
        """`responses_per_prompt` responses to each prompt (token ids), in the prompts' order.

        `on_done(i, responses)` is called as prompt i is finished, in any order.

        Raises:
            UserError: a prompt is empty or has a token id outside the vocabulary.
            ServersLostError: no server is left; `on_done` has had what is finished.
            GenerationError: a server refused a request, or several requests got no answer.
        """
        results: dict[int, list[Response]] = {}

        def keep(i: int, responses: list[Response]) -> None:
            results[i] = responses
            if on_done is not None:
                on_done(i, responses)

        self.stream(prompts, sampling, keep, responses_per_prompt=responses_per_prompt)
        return [results[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingConfig,
        on_done: OnDone,
        *,
        responses_per_prompt: int = 1,
        share: Share = Share(),
    ) -> None:
        """Like `generate`, but keeps nothing: takes a prompt when a server has a place for it, and
        hands the responses to `on_done`.

        Args:
            share: which of several leaders this is, each with a generator for the same servers.
        """
        drawing = self.streaming(
            prompts, sampling, on_done, responses_per_prompt=responses_per_prompt, share=share
        )
        asyncio.run(stop.unless_told(drawing))

    async def streaming(
        self,
        prompts: Iterable[Sequence[int] | None],
        sampling: SamplingConfig,
        on_done: OnDone,
        *,
        responses_per_prompt: int,
        share: Share,
    ) -> None:
        """`stream` as a coroutine, which can be cancelled; the servers then abort its requests.

        Args:
            prompts: None among them means that the next prompt may not be asked yet.
        """

        async def draw(client: httpx.AsyncClient, item: Item) -> list[Response]:
            self._check(item)
            responses = await draw_responses(
                client,
                item.prompt,
                sampling,
                count=responses_per_prompt,
                stop_token_ids=self._stop_token_ids,
            )
            self._check_versions(client.base_url, responses)
            for response in responses:
                self._note_length(len(item.prompt) + len(response.token_ids))
            dispatch.sequence_tokens = self._sequence_tokens
            return responses

        dispatch = Dispatch(self.urls, responses_per_prompt, share)
        dispatch.sequence_tokens = self._sequence_tokens
        limit_s = self.config.request_timeout_s
        limit_s += self.config.token_timeout_s * sampling.max_response_length
        await _Drawing(self, PromptQueue(prompts), dispatch, draw, on_done, Clocks(limit_s)).run()

    def _note_length(self, tokens: int) -> None:
        """Follows the mean length of sequences, of which a moment's sequences in flight hold about
        as many tokens each where lengths are spread as an exponential distribution's."""
        self._sequences += 1
        weight = max(1 / self._sequences, _NEWEST_WEIGHT)
        self._sequence_tokens += weight * (tokens - self._sequence_tokens)

    def _check(self, item: Item) -> None:
        if not item.prompt or not all(0 <= token < self._vocab_size for token in item.prompt):
            raise UserError(
                f"prompt {item.position}: token ids must be a non-empty list of numbers from 0 to "
                f"{self._vocab_size - 1} (vocab_size); is the tokenizer the model's own?"
            )

    def _check_versions(self, url: httpx.URL, responses: Sequence[Response]) -> None:
        if (expected := self.weight_versions) is None:
            return
        for version in {version for response in responses for version in response.versions}:
            if version not in expected:
                raise ServerLostError(
                    f"{url}: a response was drawn with weight version {version}, not with "
                    f"{' or '.join(sorted(expected))}; the server has restarted"
                )


class _Drawing:
    """One call of `Generator.stream`."""

    def __init__(
        self,
        generator: Generator,
        queue: PromptQueue,
        dispatch: Dispatch,
        draw: Callable[[httpx.AsyncClient, Item], collections.abc.Awaitable[list[Response]]],
        on_done: OnDone,
        clocks: Clocks,
    ) -> None:
        self._clocks = clocks
        self._generator = generator
        self._queue = queue
        self._dispatch = dispatch
        self._draw = draw
        self._on_done = on_done
        self._running: dict[str, tuple[asyncio.TaskGroup, httpx.AsyncClient]] = {}
        self._unknown = set(generator.urls)
        """Servers that have not said yet what they have room for. The first prompts wait for them,
        or the first server to answer would get them all."""
        self._place_free = asyncio.Event()
        self._all_done = asyncio.Event()
        self._in_flight = 0
        self._unanswered: collections.Counter[int] = collections.Counter()
        self._why_lost = "all have been lost before"

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                giving = tasks.create_task(self._give())
                beating = tasks.create_task(self._beat())
                async with asyncio.TaskGroup() as servers:
                    for url in self._generator.urls:
                        servers.create_task(self._use(url))
                giving.cancel()  # it waits for a server, if none is left
                beating.cancel()
        except ExceptionGroup as failures:
            raise _first(failures) from None
        if not self._all_done.is_set():
            raise ServersLostError(f"no server is left: {self._why_lost}")

    async def _give(self) -> None:
        """Gives the prompts to the servers, until all are done."""
        while True:
            while self._unknown or not self._dispatch.has_place:
                self._place_free.clear()
                await self._place_free.wait()
            if (item := await self._queue.take()) is None:
                self._all_done.set()
                return
            while self._generator.held:
                await asyncio.sleep(_LOOK_AGAIN_S)
            if self._dispatch.has_place:  # the server may have been lost in the meantime
                self._start(item)
            else:
                self._queue.give_back(item)

    async def _beat(self) -> None:
        """While servers work, there is progress: each request has a time limit of its own."""
        while True:
            if self._in_flight and not self._generator.held:
                heartbeat.beat()
            await asyncio.sleep(1)

    def _start(self, item: Item) -> None:
        url = self._dispatch.enter(item.position)
        tasks, client = self._running[url]

        def settle(task: asyncio.Task[bool]) -> None:
            self._in_flight -= 1
            failed = task.cancelled() or task.exception() is not None
            if failed:
                self._dispatch.close(url)
            self._dispatch.leave(url)
            self._place_free.set()
            answered = not failed and task.result()
            if answered:
                self._queue.done()
            else:
                self._queue.give_back(item)

        self._in_flight += 1
        tasks.create_task(self._ask(url, client, item)).add_done_callback(settle)

    async def _ask(self, url: str, client: httpx.AsyncClient, item: Item) -> bool:
        """Whether the prompt was answered."""
        try:
            async with self._clocks.limit(url):
                responses = await self._draw(client, item)
            self._on_done(item.position, responses)
            self._generator.answered[url] += 1
        except NoAnswerError as error:
            self._unanswered[item.position] += 1
            if self._unanswered[item.position] == _ATTEMPTS:
                raise GenerationError(
                    f"prompt {item.position}: no answer to {_ATTEMPTS} requests; {error}"
                ) from error
            # The prompt waits until this is known, and is not asked of a server in vain.
            if not await generates(client):
                raise ServerLostError(str(error)) from error
            say(f"{error}; it is asked again")
            return False
        return True

    async def _use(self, url: str) -> None:
        """Has the server answer prompts until all are done, or it is lost for good."""
        generator = self._generator
        timeout = httpx.Timeout(None, connect=30)  # the clocks limit the rest
        limits = FRESH_CONNECTIONS
        async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
            while not self._all_done.is_set():
                if url in generator.lost:
                    self._known(url)
                    if generator.lost.issuperset(generator.urls):
                        return
                    await asyncio.sleep(_LOOK_AGAIN_S)
                    continue
                try:
                    async with asyncio.TaskGroup() as tasks:
                        self._running[url] = tasks, client
                        self._dispatch.open(url, await self._capacity(client))
                        self._known(url)
                        holding = tasks.create_task(self._clocks.hold(url, client))
                        await self._all_done.wait()
                        holding.cancel()
                except* ServerLostError as failures:
                    self._known(url)
                    self._why_lost = str(failures.exceptions[0])
                    say(f"{self._why_lost}; its prompts are asked again")
                    await self._bring_back(url)

    def _known(self, url: str) -> None:
        self._unknown.discard(url)
        self._place_free.set()

    async def _capacity(self, client: httpx.AsyncClient) -> Capacity:
        found = await capacity_of(client)
        limit = self._generator.config.max_running_requests
        return Capacity(min(limit, found.sequences), found.tokens)

    async def _bring_back(self, url: str) -> None:
        """Returns when the server answers again or is in `lost`, or nobody needs it."""
        generator = self._generator
        if generator.servers is None:
            generator.lost.add(url)
            return
        try:
            generator.servers.start_again(url)
            for _ in generator.servers.coming(url):
                if self._all_done.is_set():
                    return
                await asyncio.sleep(0.5)
        except UserError as error:
            self._why_lost = str(error)
            generator.lost.add(url)


@contextlib.contextmanager
def generating(
    folder: ModelFolder,
    config: RolloutConfig,
    log_dir: Path,
    *,
    seed: int = 0,
    drawn_before: int = 0,
) -> Iterator[Generator]:
    """A generator with servers of its own, which run while it is used; see `serving`.

    Args:
        drawn_before: responses that servers with this seed have drawn already. It changes the
            servers' seeds; with the same ones they would draw the same responses again.
    """
    _ = folder.stop_token_ids  # so that a bad tokenizer is reported before servers start
    server_seed = seed + drawn_before * config.num_servers
    with serving(config, folder.path, log_dir, seed=server_seed) as servers:
        yield Generator.for_model(folder, servers.urls, config, servers)


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
