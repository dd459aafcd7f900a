"""One request to an SGLang server: token ids in, responses with log-probabilities out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from klear_megatron.errors import UserError
from klear_megatron.rollout.config import SamplingConfig
from klear_megatron.rollout.dispatch import Capacity


@dataclass(frozen=True)
class Response:
    """One drawn response of T tokens."""

    token_ids: list[int]
    """[T], the stop token included where the model produced it."""
    log_probs: list[float]
    """[T], of each token under the distribution that it was drawn from, computed by the server;
    NaN where the server's number was not finite."""
    finish_reason: Literal["stop", "length"]
    weight_version: str
    """Version of the weights that the last token was drawn from."""
    spans: tuple[tuple[str, int], ...] = ()
    """For each version that drew some of the tokens, oldest first: the version, and the number of
    tokens up to the end of its own. Empty where one version drew all."""

    @property
    def versions(self) -> list[str]:
        """The versions of the weights that drew the tokens, oldest first."""
        return [version for version, _ in self.spans] or [self.weight_version]

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class GenerationError(UserError):
    """A server refused a request, or there was no answer to it."""


class ServersLostError(GenerationError):
    """No server is left that answers."""


class NoAnswerError(Exception):
    """A request got no answer; the server may be well."""


class ServerLostError(Exception):
    """A server no longer answers, or has other weights than it should."""


async def draw_responses(
    client: httpx.AsyncClient,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    count: int,
    stop_token_ids: Sequence[int],
) -> list[Response]:
    """`count` responses to one prompt.

    Raises:
        GenerationError: the server refused the request.
        NoAnswerError: it did not answer, or is being stopped.
    """
    body = {
        "input_ids": list(prompt),
        "sampling_params": {
            "n": count,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,  # a model's generation_config may say otherwise
            "max_new_tokens": sampling.max_response_length,
            "stop_token_ids": list(stop_token_ids),
        },
        "return_logprob": True,
    }
    try:
        answer = await client.post("/generate", json=body)
    except httpx.TransportError as error:
        raise NoAnswerError(
            f"{client.base_url}: no answer to /generate: {str(error) or type(error).__name__}; "
            "see the server's log"
        ) from error
    if answer.status_code != httpx.codes.OK:
        kind = NoAnswerError if answer.is_server_error else GenerationError
        raise kind(
            f"{client.base_url}: /generate answered {answer.status_code}: {answer.text[:500]}"
        )
    outputs = answer.json() if count > 1 else [answer.json()]
    for output in outputs:
        reason = output["meta_info"]["finish_reason"]
        if reason["type"] not in ("stop", "length"):
            # A server that is being stopped aborts all responses.
            raise NoAnswerError(f"{client.base_url}: a response ended with {reason}")
    return [_response(output) for output in outputs]


async def capacity_of(client: httpx.AsyncClient) -> Capacity:
    """What the server has room for.

    Raises:
        ServerLostError: it does not answer.
    """
    try:
        info = (await client.get("/server_info", timeout=60)).raise_for_status().json()
    except httpx.HTTPError as error:
        raise ServerLostError(
            f"{client.base_url}: no answer to /server_info: {str(error) or type(error).__name__}; "
            "see the server's log"
        ) from error
    replicas = info["dp_size"]
    sequences = info["internal_states"][0]["effective_max_running_requests_per_dp"]
    return Capacity(replicas * sequences, replicas * info["max_total_num_tokens"])


async def has_waiting(client: httpx.AsyncClient) -> bool:
    """Whether some requests wait at the server, because it has no room for them yet."""
    try:
        answer = await client.get("/v1/loads", params={"include": "core"}, timeout=60)
        return any(one["num_waiting_reqs"] for one in answer.raise_for_status().json()["loads"])
    except httpx.HTTPError:
        return False


async def generates(client: httpx.AsyncClient) -> bool:
    """Whether the server generates a token, or other requests' tokens, right now."""
    try:
        return (await client.get("/health_generate", timeout=60)).is_success
    except httpx.TransportError:
        return False


def _response(output: dict[str, Any]) -> Response:
    meta = output["meta_info"]
    log_probs, token_ids = [], []
    for log_prob, token_id, *_ in meta["output_token_logprobs"]:
        # JSON has no number for NaN and infinities; SGLang writes null.
        log_probs.append(math.nan if log_prob is None else log_prob)
        token_ids.append(token_id)
    reason = meta["finish_reason"]["type"]
    spans = tuple((str(one["version"]), one["end"]) for one in meta.get("weight_versions", ()))
    if len(spans) == 1:
        spans = ()
    return Response(token_ids, log_probs, reason, str(meta["weight_version"]), spans)
