"""Drawing responses from SGLang servers: token ids in, token ids and log-probabilities out."""

import asyncio
import collections
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig
from klear_megatron.rollout.prompt_queue import Item, Work
from klear_megatron.rollout.servers import FRESH_CONNECTIONS, Servers


@dataclass(frozen=True)
class Response:
    """One drawn response of T tokens."""

    token_ids: list[int]
    """[T], the stop token included where the model produced it."""
    log_probs: list[float]
    """[T], of each token under the distribution it was drawn from, by the server's reckoning."""
    finish_reason: Literal["stop", "length"]
    weight_version: str
    """Version of the weights that the last token was drawn from."""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


OnDone = Callable[[int, list[Response]], None]
"""Is given a prompt's position and the responses to it."""

_ATTEMPTS = 3
"""Requests that a prompt is given: it may be what ends the servers."""


class GenerationError(UserError):
    """A server refused a request, or there was no answer to it."""


class ServersLostError(GenerationError):
    """No server is left that answers."""


class _NoAnswerError(Exception):
    """To one request; the server may be well."""


class _ServerLostError(Exception):
    """It answers no more, or not with the weights it should have."""


class Generator:
    """Draws responses from a set of servers that share the work.

    Each server is given as many prompts at a time as keep `max_running_requests` sequences going;
    whichever has room takes the next prompt. A prompt without an answer is given to a server again,
    to another where the first one is lost.

    Args:
        vocab_size: ids at or above it are refused here, because one of them ends a server.
        stop_token_ids: a response ends with the first of them.
        servers: start a lost server again, with the weights it had. Without them a lost server is
            not used until it is taken out of `lost`.
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
        self._urls = urls
        self._config = config
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        self._servers = servers
        self.lost: set[str] = set()
        """Servers that do not answer, or answered with other weights than `weight_version`."""
        self.weight_version: str | None = None
        """Of the weights that responses have to be drawn from, if that matters."""

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
            ServersLostError: no server is left; what is done has been given to `on_done`.
            GenerationError: a server refused a request, or none of several was answered.
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
    ) -> None:
        """Like `generate`, but nothing is kept: prompts are taken as servers have room for them,
        and responses are only handed to `on_done`."""
        asyncio.run(self._stream(prompts, sampling, responses_per_prompt, on_done))

    async def _stream(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingConfig,
        responses_per_prompt: int,
        on_done: OnDone,
    ) -> None:
        work = Work(prompts)
        at_a_time = max(1, self._config.max_running_requests // responses_per_prompt)
        timeout = httpx.Timeout(self._config.request_timeout_s, connect=30)
        reason = "all have been lost before"

        async def ask(client: httpx.AsyncClient) -> None:
            while (item := await work.take()) is not None:
                self._check(item)
                try:
                    # Until it is known whether the server is lost: others of its tasks would take
                    # the item, and try in vain.
                    with work.in_hand(item):
                        responses = await attempt(client, item)
                except _NoAnswerError as error:
                    say(f"{error}; it is asked again")
                else:
                    on_done(item.position, responses)

        async def attempt(client: httpx.AsyncClient, item: Item) -> list[Response]:
            try:
                return await self._request(client, item.prompt, sampling, responses_per_prompt)
            except _NoAnswerError as error:
                unanswered[item.position] += 1
                if unanswered[item.position] == _ATTEMPTS:
                    raise GenerationError(
                        f"prompt {item.position}: no answer to {_ATTEMPTS} requests; {error}"
                    ) from error
                if not await _answers(client):
                    raise _ServerLostError(str(error)) from error
                raise

        async def use(url: str) -> None:
            nonlocal reason
            limits = FRESH_CONNECTIONS
            async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
                while url not in self.lost:
                    try:
                        async with asyncio.TaskGroup() as tasks:
                            for _ in range(at_a_time):
                                tasks.create_task(ask(client))
                        return
                    except* _ServerLostError as failures:
                        reason = str(failures.exceptions[0])
                    say(f"{reason}; its prompts are asked again")
                    try:
                        await bring_back(url)
                    except UserError as error:
                        reason = str(error)
                        self.lost.add(url)

        async def bring_back(url: str) -> None:
            if self._servers is None:
                self.lost.add(url)
                return
            self._servers.start_again(url)
            for _ in self._servers.coming(url):
                if work.finished:
                    return
                await asyncio.sleep(0.5)

        unanswered: collections.Counter[int] = collections.Counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                for url in self._urls:
                    tasks.create_task(use(url))
        except ExceptionGroup as failures:
            raise _first(failures) from None
        if await work.take() is not None:
            raise ServersLostError(f"no server is left: {reason}")

    def _check(self, item: Item) -> None:
        if not item.prompt or not all(0 <= token < self._vocab_size for token in item.prompt):
            raise UserError(
                f"prompt {item.position}: token ids must be a non-empty list of numbers from 0 to "
                f"{self._vocab_size - 1} (vocab_size); is the tokenizer the model's own?"
            )

    async def _request(
        self, client: httpx.AsyncClient, prompt: Sequence[int], sampling: SamplingConfig, n: int
    ) -> list[Response]:
        body = {
            "input_ids": list(prompt),
            "sampling_params": {
                "n": n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": -1,  # a model's generation_config may say otherwise
                "max_new_tokens": sampling.max_response_length,
                "stop_token_ids": self._stop_token_ids,
            },
            "return_logprob": True,
        }
        try:
            answer = await client.post("/generate", json=body)
        except httpx.TransportError as error:
            raise _NoAnswerError(
                f"{client.base_url}: no answer to /generate: {str(error) or type(error).__name__}; "
                "see the server's log"
            ) from error
        if answer.status_code != httpx.codes.OK:
            kind = _NoAnswerError if answer.is_server_error else GenerationError
            raise kind(
                f"{client.base_url}: /generate answered {answer.status_code}: {answer.text[:500]}"
            )
        outputs = answer.json()
        responses = []
        for output in outputs if n > 1 else [outputs]:
            reason = output["meta_info"]["finish_reason"]
            if reason["type"] not in ("stop", "length"):
                # A server that is being stopped ends all responses.
                raise _NoAnswerError(f"{client.base_url}: a response ended with {reason}")
            responses.append(_response(output))
            version = responses[-1].weight_version
            if self.weight_version not in (None, version):
                raise _ServerLostError(
                    f"{client.base_url}: a response was drawn with weight version {version}, not "
                    f"with {self.weight_version}; the server has been started anew"
                )
        return responses


async def _answers(client: httpx.AsyncClient) -> bool:
    """Whether the server generates a token, or others, even now."""
    try:
        return (await client.get("/health_generate", timeout=60)).is_success
    except httpx.TransportError:
        return False


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _response(output: dict[str, Any]) -> Response:
    meta = output["meta_info"]
    log_probs, token_ids = [], []
    for log_prob, token_id, *_ in meta["output_token_logprobs"]:
        log_probs.append(log_prob)
        token_ids.append(token_id)
    reason = meta["finish_reason"]["type"]
    return Response(token_ids, log_probs, reason, str(meta["weight_version"]))
