"""Writes graded responses as readable rows."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from klear_megatron.data import Prompt
from klear_megatron.platform.files import write_atomically
from klear_megatron.rewards import Reward
from klear_megatron.rollout import Response


def response_row(
    prompt: Prompt, text: str, response: Response, reward: Reward | None, **more: Any
) -> dict[str, Any]:
    """One response with all its details, ready for JSON; `reward` is None until it is graded."""
    return {
        "prompt": prompt.messages,
        "ground_truth": prompt.ground_truth,
        "data_source": prompt.data_source,
        "index": prompt.index,
        "response": text,
        "tokens": len(response.token_ids),
        "finish_reason": response.finish_reason,
        "weight_version": response.weight_version,
        "reward": asdict(reward) if reward is not None else None,
        **more,
    }


def ungraded_row(prompt: Prompt, text: str, response: Response) -> dict[str, Any]:
    """A response to be graded later, with all that a reward function may ask for."""
    return response_row(prompt, text, response, None, extra_info=prompt.extra_info)


def json_line(row: dict[str, Any]) -> str:
    """The row as a line of JSON; dates and other values of Parquet files become text."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines; `path` appears, or is replaced, once all rows are written."""
    with write_atomically(path) as file:
        for row in rows:
            file.write(json_line(row))
