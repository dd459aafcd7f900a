"""Reads the rollouts that RL runs dump: distributions of all, and a sample to look through."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from klear_megatron.checkpoints.run_config import tokenizer_folder
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.observability import RolloutFiles
from klear_megatron.report.runs import Run

_BINS = 24


def distributions(files: RolloutFiles) -> dict[str, Any] | None:
    """Per step, the shares of the responses in bins of length and of reward; None without any."""
    lengths: dict[int, list[float]] = {}
    rewards: dict[int, list[float]] = {}
    for step in files.steps():
        for row in files.read_texts(step):
            lengths.setdefault(step, []).append(row["tokens"])
            rewards.setdefault(step, []).append(row["reward"]["score"])
    if not rewards:
        return None
    return {"tokens": _shares(lengths), "reward": _shares(rewards)}


def _shares(by_step: dict[int, list[float]]) -> dict[str, Any]:
    everything = np.concatenate([np.asarray(values) for values in by_step.values()])
    edges = np.histogram_bin_edges(everything, bins=_BINS)
    counts = [np.histogram(values, bins=edges)[0] for values in by_step.values()]
    return {
        "steps": list(by_step),
        "edges": edges.round(6).tolist(),
        "shares": [(of_one / of_one.sum()).round(5).tolist() for of_one in counts],
    }


def sample(files: RolloutFiles, run: Run, number: int, limit: int) -> Iterator[dict[str, Any]]:
    """Rows of the page's browser: as many of each step's responses, from its beginning, so that
    whole groups can be seen; at most `limit`.

    Args:
        number: of the run on the page.
    """
    steps = files.steps()
    chosen = steps if len(steps) <= limit else steps[:: -(-len(steps) // max(limit, 1))]
    decode = _decoder(run)
    for place, step in enumerate(chosen):
        # The first steps get what the division leaves over.
        wanted = limit // len(chosen) + (place < limit % len(chosen))
        for row in itertools.islice(files.read(step), wanted):
            yield _row(row, number, step) | _tokens(row, decode)


def _decoder(run: Run) -> Callable[[int], str] | None:
    """Gives a token's text; None where the model's tokenizer is not there any more."""
    try:
        tokenizer = read_tokenizer(tokenizer_folder(run.folder))
    except UserError:
        return None
    texts: dict[int, str] = {}

    def decode(token: int) -> str:
        if token not in texts:
            texts[token] = str(tokenizer.decode([token]))
        return texts[token]

    return decode


def _row(row: dict[str, Any], run: int, step: int) -> dict[str, Any]:
    reward = row["reward"]
    return {
        "run": run,
        "step": step,
        "source": row["data_source"],
        "prompt": [[message["role"], message["content"]] for message in row["prompt"]],
        "truth": _shortened(row["ground_truth"]),
        "response": row["response"],
        "tokens": row["tokens"],
        "finish": row["finish_reason"],
        "reward": reward["score"],
        "correct": reward["correct"],
        "parts": reward["parts"],
        "advantage": row["advantage"],
    }


def _tokens(row: dict[str, Any], decode: Callable[[int], str] | None) -> dict[str, Any]:
    """The response token by token, where that was kept: each token's text, the trainer's
    log-probability minus the server's, whether it is trained on, and how training clipped it."""
    if decode is None or row.get("mask") is None:
        return {}
    pairs = zip(row["old_log_probs"], row["rollout_log_probs"], strict=True)
    return {
        "pieces": [decode(token) for token in row["token_ids"]],
        "differences": [None if None in pair else round(pair[0] - pair[1], 4) for pair in pairs],
        "trained": row["mask"],
        "clipped": row.get("clipped"),
    }


def _shortened(value: Any, limit: int = 200) -> str:
    """A ground truth as text; the tests of a program can be long."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[:limit] + "…"
