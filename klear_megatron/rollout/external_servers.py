"""Checks on the servers of `rollout.urls`, which are already running."""

import time
from pathlib import Path
from typing import Any

import httpx
from transformers import PretrainedConfig

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.platform.first_rank import is_first_to_report
from klear_megatron.rollout.config import RolloutConfig, SamplingConfig
from klear_megatron.rollout.server_side import SERVER_SIDE, WEIGHT_LOADER

_FIRST_VERSION = "default"
"""SGLang's name for the weights that a server has read from its checkpoint."""
_LOOK_AGAIN_S = 0.5


def wait_for(config: RolloutConfig) -> None:
    """Returns once every server of `rollout.urls` answers; they may still be starting.

    Raises:
        UserError: one does not within `start_timeout_s`.
    """
    deadline = time.monotonic() + config.start_timeout_s
    for url in config.urls:
        waiting = f"waiting up to {config.start_timeout_s:.0f} s for the SGLang server at {url}"
        said = False
        while (reason := _why_silent(url)) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rollout.urls: no SGLang server answers at {url} within "
                    f"{config.start_timeout_s:.0f} s (rollout.start_timeout_s): {reason}; start it "
                    "(`klear-megatron serve`) or correct the address"
                )
            if not said and is_first_to_report(waiting):
                say(waiting)
            said = True
            time.sleep(_LOOK_AGAIN_S)


def _why_silent(url: str) -> str | None:
    try:
        httpx.get(f"{url}/model_info", timeout=30).raise_for_status()
    except httpx.InvalidURL as error:
        raise UserError(f"rollout.urls: {url}: {error}; correct the address") from error
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None


def check_serves(url: str, model: Path) -> None:
    """Checks that the server serves this checkpoint, with its original weights.

    Raises:
        UserError: it serves another checkpoint, a trainer has replaced its weights, or it does not
            answer.
    """
    info = _ask(url, "model_info")
    served, version = info["model_path"], info["weight_version"]
    if Path(served).resolve() != model.resolve():
        raise UserError(
            f"rollout.urls: {url} serves {served}, but {model} is asked for; give the address of a "
            "server of that (`klear-megatron serve`), set model to what is served, or leave "
            "rollout.urls out to start servers"
        )
    if version != _FIRST_VERSION:
        raise UserError(
            f"rollout.urls: {url} was started with {served}, but training has replaced its "
            f"weights since (weight version {version}); restart it to get those of {model}, or "
            "leave rollout.urls out to start servers"
        )


def check_takes(url: str, model: Path) -> None:
    """Checks that the weights of this checkpoint's architecture and size fit the server.

    SGLang ignores weights that it has no place for and keeps those that it is not given, so it
    would not notice. If the server's checkpoint cannot be read from this host, only the name of
    its architecture is compared.

    Raises:
        UserError: its weights have other names or shapes, it was started without the loader of
            `server_side`, or it does not answer.
    """
    if WEIGHT_LOADER not in (_ask(url, "server_info")["custom_weight_loader"] or ()):
        raise UserError(
            f"rollout.urls: {url} was started without what receives a trainer's weights; start "
            f"it with `klear-megatron serve`, or with `--custom-weight-loader {WEIGHT_LOADER}` and "
            f"PYTHONPATH={SERVER_SIDE}"
        )
    info = _ask(url, "model_info")
    served, wanted = Path(info["model_path"]), ModelFolder(model)
    same = info["architectures"] == wanted.config.architectures
    if same and (served / "config.json").is_file():
        same = _shapes(ModelFolder(served)) == _shapes(wanted)
    if not same:
        raise UserError(
            f"rollout.urls: {url} serves {served}, whose weights have other names or shapes than "
            f"those of {model} and cannot be replaced by them; serve {model} there "
            "(`klear-megatron serve`), or leave rollout.urls out to start servers"
        )


def check_lengths(
    config: RolloutConfig,
    hf: PretrainedConfig,
    longest_prompt: int,
    sampling: SamplingConfig,
    section: str = "sampling",
) -> None:
    """Checks that the servers' context is long enough for a prompt and its response.

    Args:
        longest_prompt: tokens.
        section: the name of `sampling` in the config, for the message.

    Raises:
        UserError: it is not, or a server of `rollout.urls` does not answer.
    """
    wait_for(config)
    limits = [config.context_length or hf.get_text_config().max_position_embeddings]
    if config.urls:
        # Their context may have been extended; only a smaller context_length here limits it.
        limits = [config.context_length] if config.context_length else []
        limits += [_ask(url, "v1/models")["data"][0]["max_model_len"] for url in config.urls]
    longest = longest_prompt + sampling.max_response_length
    if longest > min(limits):
        raise UserError(
            f"{section}.max_response_length: {sampling.max_response_length} tokens after the "
            f"longest prompt's {longest_prompt} make {longest}, but the servers take {min(limits)} "
            "(rollout.context_length, or what the servers of rollout.urls were started with, or "
            "the model's max_position_embeddings); use a smaller one"
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


def _shapes(folder: ModelFolder) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's weights, by name."""
    return {name: shape for row in folder.table() for name, shape in row.sources.items()}
