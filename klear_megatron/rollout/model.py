"""Generators for a Hugging Face checkpoint, which tells its vocabulary and its stop tokens."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.hf_reader import read_config
from klear_megatron.models.tokenizer import read_stop_token_ids
from klear_megatron.rollout.config import RolloutConfig
from klear_megatron.rollout.generation import Generator
from klear_megatron.rollout.servers import serving


def generator_of(
    model: Path, tokenizer: PreTrainedTokenizerBase, urls: Sequence[str], config: RolloutConfig
) -> Generator:
    """For servers that serve this checkpoint."""
    return Generator(urls, config, **_told_by(model, tokenizer))


@contextlib.contextmanager
def generating(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    log_dir: Path,
    *,
    seed: int = 0,
    drawn_before: int = 0,
) -> Iterator[Generator]:
    """A generator, and the servers it needs while it is used; lost ones are started again.

    See `serving`.

    Args:
        drawn_before: responses that servers of the same seed have drawn before these, which get
            other seeds: with the same ones they would draw the same responses again.
    """
    told = _told_by(model, tokenizer)  # first: a mistake is not to wait for servers to start
    server_seed = seed + drawn_before * config.num_servers
    with serving(config, model, log_dir, seed=server_seed) as servers:
        yield Generator(servers.urls, config, **told, servers=servers)


def _told_by(model: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": read_config(model).vocab_size,
        "stop_token_ids": read_stop_token_ids(model, tokenizer),
    }
