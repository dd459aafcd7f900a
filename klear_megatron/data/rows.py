"""What a row of a data file must look like."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from klear_megatron.data.columns import column, ground_truth, optional_column, prompt_messages
from klear_megatron.data.config import ConversationColumns, PromptColumns
from klear_megatron.data.files import Row, read_rows
from klear_megatron.data.messages import Message, are_messages, describe, read_messages
from klear_megatron.data.published import published_format
from klear_megatron.errors import UserError

OnBadRow = Callable[[UserError], object]


@dataclass(frozen=True)
class Prompt:
    """A problem to answer, and the ground truth that its answer is checked against.

    `data_source` chooses the verifier; `index` is the row's number among those read, from 0.
    """

    data_source: str
    messages: list[Message]
    ground_truth: str | list[str]
    index: int
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    """What else the row says, for reward functions of the user's own."""


@dataclass(frozen=True)
class Conversation:
    """A worked example for SFT; `index` is the row's number among those read, from 0."""

    messages: list[Message]
    index: int
    tools: list[Any] = field(default_factory=list)
    """Descriptions of what the assistant may call, as the chat template takes them."""


Parsed = TypeVar("Parsed")


def read_prompts(path: Path | Sequence[Path], on_bad_row: OnBadRow | None = None) -> list[Prompt]:
    """Reads problems, in a format of `parse_prompt`, from one or several data sets.

    Args:
        path: one or several paths as `read_rows` takes them, read one after another.
        on_bad_row: called with the error of each malformed row, which is then skipped; without
            it, the first such error is raised.

    Raises:
        UserError: a file does not exist, there are no rows, or a row is malformed (the message
            names file, line and field).
    """
    prompts = [prompt for _, prompt in parse_rows(path, parse_prompt, on_bad_row)]
    if not prompts:
        raise UserError(f"{path}: all rows are malformed; is it of another format?")
    return prompts


def parse_prompt(row: Row, index: int, columns: PromptColumns = PromptColumns()) -> Prompt:
    """Parses a row in Klear's or verl's format, or as LiveCodeBench, LeetCodeDataset, TACO, APPS
    and Codeforces are published, or of the columns that a config names.

    Raises:
        UserError: the row is malformed; each line of the message begins with a field.
        ValidationError: the same, of a published format.
    """
    ours = columns.are_named or "reward_model" in row
    if not ours and (published := published_format(row)) is not None:
        problem = published.model_validate(row)
        source = columns.data_source or problem.data_source
        return Prompt(source, problem.messages, problem.ground_truth, index)
    if optional_column(row, "tools"):
        raise UserError("tools: a prompt is answered in one turn, without tools; remove the column")
    return Prompt(
        columns.data_source or _data_source(row),
        prompt_messages(row, columns.prompt_key, columns.prompt_template),
        ground_truth(row, columns.ground_truth_key, columns.ground_truth_pattern),
        index,
        optional_column(row, "extra_info") or {},
    )


def _data_source(row: Row) -> str:
    value = column(row, "data_source", "data_source, for all rows: math, for instance")
    if not isinstance(value, str) or not value:
        raise UserError("data_source: Input should be a valid string, not an empty one")
    return value


def parse_conversation(
    row: Row, index: int, columns: ConversationColumns = ConversationColumns()
) -> Conversation:
    """Parses a row of messages, or of a prompt and a response, as the config names its columns.

    Raises:
        UserError: the row is malformed; each line of the message begins with a field.
    """
    if columns.response_key is not None:
        key = columns.response_key
        messages = prompt_messages(row, columns.prompt_key or "", columns.prompt_template)
        response = column(row, key, "response_key")
        if not are_messages(response):
            response = [{"role": "assistant", "content": response}]
        messages += read_messages(response, key)
    else:
        key = columns.messages_key
        setting = "messages_key, or prompt_key and response_key"
        messages = read_messages(_list_in(column(row, key, setting), key, "messages"), key)
    if len(messages) < 2:
        raise UserError(f"{key}: List should have at least 2 items")
    if messages[0]["role"] == "assistant":
        raise UserError(f"{key}: The first message must not be the assistant's")
    if not any(map(is_trained, messages)):
        raise UserError(f"{key}: There is no assistant message to train on")
    return Conversation(messages, index, _tools(row, columns.tools_key))


def is_trained(message: Message) -> bool:
    """Whether a message is the assistant's, and has no `weight` of 0."""
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _tools(row: Row, key: str) -> list[Any]:
    return _list_in(optional_column(row, key) or [], key, "tools")


def _list_in(value: Any, key: str, what: str) -> list[Any]:
    """The list, which may be a text of JSON, as Parquet and CSV files have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(
                f"{key}: Input should be a list of {what}, or a text of JSON, but is no such text: "
                f"{error}"
            ) from error
    if not isinstance(value, list):
        raise UserError(f"{key}: Input should be a list of {what}")
    return value


def parse_rows(
    path: Path | Sequence[Path],
    parse: Callable[[Row, int], Parsed],
    on_bad_row: OnBadRow | None = None,
    *,
    subset: str | None = None,
    split: str | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[Row, Parsed]]:
    """Streams the rows of data sets, each both raw and parsed.

    Args:
        path, subset, split: as `read_rows` takes them.
        parse: `parse(row, index)` raises ValidationError, or a UserError of which each line begins
            with the field.
        part: the number of this part, from 0; each of the `parts` parts has every `parts`-th row.
    """
    for index, (where, row) in enumerate(read_rows(path, subset, split)):
        if index % parts != part:
            continue
        try:
            if isinstance(row, str):
                raise UserError(f"{where}: {row}\nCorrect or remove the row.")
            try:
                parsed = parse(row, index)
            except ValidationError as error:
                raise _at(where, describe(error)) from error
            except UserError as error:
                raise _at(where, str(error)) from error
        except UserError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
        else:
            yield row, parsed


def _at(where: str, problems: str) -> UserError:
    """The problems of a row, one per line, each with its place."""
    lines = [f"{where}, field {problem}" for problem in problems.splitlines()]
    return UserError("\n".join([*lines, "Correct or remove the row."]))
