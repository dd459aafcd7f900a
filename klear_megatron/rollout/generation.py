"""Drawing responses from SGLang servers: token ids in, token ids and log-probabilities out."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from klear_megatron.errors import UserError
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig
from klear_megatron.rollout.servers import FRESH_CONNECTIONS


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


class GenerationError(UserError):
    """A server answered a request with an error, or not at all."""


class Generator:
    """Draws responses from a set of servers that share the work.

    Each server is given as many prompts at a time as keep `max_running_requests` sequences going;
    whichever has room takes the next prompt.

    Args:
        vocab_size: ids at or above it are refused here, because one of them ends a server.
        stop_token_ids: a response ends with the first of them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        *,
        vocab_size: int,
        stop_token_ids: Sequence[int],
    ) -> None:
        self._urls = urls
        self._config = config
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)

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
            GenerationError: a server failed.
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
        waiting = enumerate(prompts)
        at_a_time = max(1, self._config.max_running_requests // responses_per_prompt)

        async def work(client: httpx.AsyncClient) -> None:
            for i, prompt in waiting:
                self._check(i, prompt)
                on_done(i, await self._request(client, prompt, sampling, responses_per_prompt))

        timeout = httpx.Timeout(self._config.request_timeout_s, connect=30)
        clients = [
            httpx.AsyncClient(base_url=url, timeout=timeout, limits=FRESH_CONNECTIONS)
            for url in self._urls
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                for client in clients:
                    for _ in range(at_a_time):
                        tasks.create_task(work(client))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for client in clients:
                await client.aclose()

    def _check(self, i: int, prompt: Sequence[int]) -> None:
        if not prompt or not all(0 <= token < self._vocab_size for token in prompt):
            raise UserError(
                f"prompt {i}: token ids must be a non-empty list of numbers from 0 to "
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
            raise GenerationError(
                f"{client.base_url}: no answer to /generate: {str(error) or type(error).__name__}; "
                "see the server's log"
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise GenerationError(
                f"{client.base_url}: /generate answered {answer.status_code}: {answer.text[:500]}"
            )
        outputs = answer.json()
        return [_response(output) for output in (outputs if n > 1 else [outputs])]


def _response(output: dict[str, Any]) -> Response:
    meta = output["meta_info"]
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise GenerationError(f"a response ended with {meta['finish_reason']}")
    log_probs, token_ids = [], []
    for log_prob, token_id, *_ in meta["output_token_logprobs"]:
        log_probs.append(log_prob)
        token_ids.append(token_id)
    return Response(token_ids, log_probs, reason, str(meta["weight_version"]))
