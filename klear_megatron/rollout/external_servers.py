"""Servers that run already, those of `rollout.urls`: what they serve, and whether it is wanted."""

from pathlib import Path
from typing import Any

import httpx
from transformers import PretrainedConfig

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.errors import UserError
from klear_megatron.models import get_architecture, padded_vocab_size
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig

_FIRST_VERSION = "default"
"""What SGLang calls the weights that a server has from its checkpoint."""


def check_serves(url: str, model: Path) -> None:
    """Whether the server answers as this checkpoint does.

    Raises:
        UserError: it serves another, a trainer has given it other weights, or it does not answer.
    """
    told = _ask(url, "model_info")
    served, version = told["model_path"], told["weight_version"]
    if Path(served).resolve() != model.resolve():
        raise UserError(
            f"rollout.urls: {url} serves {served}, but {model} is asked for; give the address of a "
            "server of that (`klear-megatron serve`), name as model what is served, or leave "
            "rollout.urls out to have servers started"
        )
    if version != _FIRST_VERSION:
        raise UserError(
            f"rollout.urls: {url} was started with {served}, but its weights have been replaced "
            f"since (weight version {version}), as training does; start it again to have those of "
            f"{model}, or leave rollout.urls out to have servers started"
        )


def check_takes(url: str, model: Path) -> None:
    """Whether the server can be given the weights of a model like this checkpoint.

    SGLang itself does not refuse weights that it has no place for, and keeps what it is not given.
    A server whose checkpoint is not to be seen from here is judged by its architecture's name.

    Raises:
        UserError: its model has other weights, by name or shape, or it does not answer.
    """
    told = _ask(url, "model_info")
    served, hf = Path(told["model_path"]), read_config(model)
    same = told["architectures"] == hf.architectures
    if same and (served / "config.json").is_file():
        same = _shapes(read_config(served)) == _shapes(hf)
    if not same:
        raise UserError(
            f"rollout.urls: {url} serves {served}, whose weights are not of the names and shapes "
            f"of those of {model}, and so cannot be replaced by them; serve {model} there "
            "(`klear-megatron serve`), or leave rollout.urls out to have servers started"
        )


def check_lengths(
    config: RolloutConfig, hf: PretrainedConfig, longest_prompt: int, sampling: SamplingConfig
) -> None:
    """Whether the servers take a prompt and its response together.

    Args:
        longest_prompt: in tokens.

    Raises:
        UserError: they do not, or one that should run already does not answer.
    """
    limits = [config.context_length or hf.max_position_embeddings]
    if config.urls:
        # Theirs may have been extended, and that is no mistake unless the config says less.
        limits = [config.context_length] if config.context_length else []
        limits += [_ask(url, "v1/models")["data"][0]["max_model_len"] for url in config.urls]
    longest = longest_prompt + sampling.max_response_length
    if longest > min(limits):
        raise UserError(
            f"sampling.max_response_length: {sampling.max_response_length} tokens after the "
            f"longest prompt's {longest_prompt} make {longest}, but the servers take {min(limits)} "
            "(rollout.context_length, or what the servers at rollout.urls were started with, or "
            "the model's max_position_embeddings); choose less"
        )


def _ask(url: str, path: str) -> Any:
    try:
        return httpx.get(f"{url}/{path}", timeout=30).raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UserError(
            f"rollout.urls: no SGLang server answers at {url}/{path}: "
            f"{str(error) or type(error).__name__}; start it (`klear-megatron serve`) or correct "
            "the address"
        ) from error


def _shapes(hf: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's weights, by name."""
    table = get_architecture(hf).weights(hf, padded_vocab_size(hf.vocab_size, 1))
    return {name: shape for row in table for name, shape in row.sources.items()}
