"""`klear-megatron show RUN_DIR STEP`: what a step's responses were, token by token."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from klear_megatron.checkpoints.run_config import tokenizer_folder
from klear_megatron.errors import UserError
from klear_megatron.observability import RolloutFiles

Row = Mapping[str, Any]
"""As `RolloutFiles.read` gives it."""

_LIST = "{:>8}  {:>7}  {:>6}  {:>6}  {:>6}  {:>7}  {:>7}  {:>10}  {:24}  {}"
_ROW = "{:>8}  {:>7}  {:>9}  {:>9}  {:>10}  {:>7}  {}"
_NONE = "-"
_SHOWN = 24
"""Characters of a ground truth, and of a response's end, in the list."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("run_dir", type=Path, help="run_dir of `klear-megatron rl`")
    parser.add_argument("step", type=int, help="number of the step")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--response", type=int, help="print this one of the list token by token")
    which.add_argument("--token", help="list only responses with this token, such as <|im_end|>")


def run(arguments: argparse.Namespace) -> None:
    """Prints a list of the step's responses, or one of them token by token.

    Raises:
        UserError: there is no such step, response or token, or the tokens were not kept.
    """
    rows = list(RolloutFiles(arguments.run_dir).read(arguments.step))
    if arguments.response is None and arguments.token is None:
        print("\n".join(listed(enumerate(rows))))
        return
    if "token_ids" not in rows[0]:
        raise UserError(
            f"{arguments.run_dir}: the tokens of step {arguments.step} were not kept, only the "
            "texts; token_dumps in the run's config says for how many steps they are"
        )
    from klear_megatron.models.tokenizer import read_tokenizer

    tokenizer: Any = read_tokenizer(tokenizer_folder(arguments.run_dir))
    if arguments.token is not None:
        token = tokenizer.get_vocab().get(arguments.token)
        if token is None:
            raise UserError(f"--token: the model's tokenizer has no token {arguments.token!r}")
        found = [(i, row) for i, row in enumerate(rows) if token in row["token_ids"]]
        print("\n".join(listed(found)))
        return
    if not 0 <= arguments.response < len(rows):
        raise UserError(f"--response: step {arguments.step} has responses 0 to {len(rows) - 1}")
    print("\n".join(token_by_token(rows[arguments.response], tokenizer.decode)))


def listed(rows: Iterable[tuple[int, Row]]) -> Iterator[str]:
    """A line per numbered response, under a head."""
    yield _LIST.format(
        "response",
        "problem",
        "reward",
        "right",
        "tokens",
        "ended",
        "trained",
        "difference",
        "ground truth",
        "end of the response",
    )
    for number, row in rows:
        reward = row["reward"]
        trained = "" if "mask" not in row else "yes" if row["mask"] is not None else "no"
        yield _LIST.format(
            number,
            row["index"],
            f"{reward['score']:.2f}",
            "yes" if reward["correct"] else "no",
            row["tokens"],
            row["finish_reason"],
            trained,
            _number(max(_differences(row), default=None)),
            " ".join(str(row["ground_truth"]).split())[:_SHOWN],
            repr(row["response"][-_SHOWN:]),
        )


def token_by_token(row: Row, decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Lines about one response and each of its tokens."""
    yield f"prompt: {decode(row['prompt_ids'])!r}"
    yield f"response: {row['response']!r}"
    yield f"ground truth: {row['ground_truth']}"
    yield f"reward: {json.dumps(row['reward'])}, advantage {row['advantage']:.4f}"
    if row["mask"] is None:
        yield "not trained on: the trainer computed no log-probabilities"
    yield _ROW.format("position", "id", "server", "trainer", "difference", "trained", "token")
    count = len(row["token_ids"])
    columns = (
        row["token_ids"],
        row["rollout_log_probs"],
        row["old_log_probs"] or [None] * count,
        row["mask"] or [None] * count,
    )
    for position, (token, server, trainer, mask) in enumerate(zip(*columns, strict=True)):
        known = server is not None and trainer is not None
        yield _ROW.format(
            position,
            token,
            _number(server),
            _number(trainer),
            _number(trainer - server if known else None),
            _NONE if mask is None else "yes" if mask else "no",
            repr(decode([token])),
        )


def _differences(row: Row) -> list[float]:
    """The absolute differences of both log-probabilities, where both are known."""
    if not row.get("old_log_probs"):
        return []
    pairs = zip(row["rollout_log_probs"], row["old_log_probs"], strict=True)
    return [abs(a - b) for a, b in pairs if a is not None and b is not None]


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"
