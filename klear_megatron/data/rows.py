"""What a row of a data file must look like."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from klear_megatron.data.files import Row, read_rows
from klear_megatron.data.published import NonEmptyText, published_format
from klear_megatron.errors import UserError

Message = dict[str, str]
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


class _Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _RewardModel(BaseModel):
    ground_truth: str | list[str]
    style: str | None = None

    # One plain error: pydantic reports a failed union as two errors with odd field names.
    @field_validator("ground_truth", mode="plain")
    @classmethod
    def _has_answers(cls, value: Any) -> Any:
        answers = value if isinstance(value, list) else [value]
        if not answers or not all(isinstance(answer, str) and answer for answer in answers):
            raise PydanticCustomError(
                "ground_truth", "Input should be a string or a list of strings, none of them empty"
            )
        return value


class _KlearRow(BaseModel):
    data_source: NonEmptyText
    prompt: list[_Message] = Field(min_length=1)
    ability: str | None = None
    reward_model: _RewardModel
    extra_info: dict[str, Any] | None = None


class _ConversationRow(BaseModel):
    messages: list[_Message] = Field(min_length=2)

    @field_validator("messages")
    @classmethod
    def _has_something_to_learn(cls, messages: list[_Message]) -> list[_Message]:
        if messages[0].role == "assistant":
            raise PydanticCustomError("messages", "The first message must not be the assistant's")
        if not any(message.role == "assistant" for message in messages):
            raise PydanticCustomError("messages", "There is no assistant message to train on")
        return messages


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


def parse_prompt(row: Row, index: int) -> Prompt:
    """Parses a row in Klear's format, or as LiveCodeBench, LeetCodeDataset, TACO, APPS and
    Codeforces are published.

    Raises:
        ValidationError: the row is malformed.
    """
    if "reward_model" not in row and (published := published_format(row)) is not None:
        problem = published.model_validate(row)
        return Prompt(problem.data_source, problem.messages, problem.ground_truth, index)
    parsed = _KlearRow.model_validate(row)
    messages = [message.model_dump() for message in parsed.prompt]
    return Prompt(
        parsed.data_source,
        messages,
        parsed.reward_model.ground_truth,
        index,
        parsed.extra_info or {},
    )


def parse_conversation(row: Row, index: int) -> Conversation:
    """Parses a row of conversation messages.

    Raises:
        ValidationError: the row is malformed.
    """
    parsed = _ConversationRow.model_validate(row)
    return Conversation([message.model_dump() for message in parsed.messages], index)


def parse_rows(
    path: Path | Sequence[Path],
    parse: Callable[[Row, int], Parsed],
    on_bad_row: OnBadRow | None = None,
    *,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[Row, Parsed]]:
    """Streams the rows of data sets, each both raw and parsed.

    Args:
        parse: `parse(row, index)` raises ValidationError, or a UserError whose message begins
            with the field.
        part: the number of this part, from 0; each of the `parts` parts has every `parts`-th row.
    """
    for index, (where, row) in enumerate(read_rows(path)):
        if index % parts != part:
            continue
        try:
            if isinstance(row, str):
                raise UserError(f"{where}: {row}\nCorrect or remove the row.")
            try:
                parsed = parse(row, index)
            except ValidationError as error:
                raise UserError(_describe(error, where)) from error
            except UserError as error:
                raise UserError(f"{where}, field {error}\nCorrect or remove the row.") from error
        except UserError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
        else:
            yield row, parsed


def _describe(error: ValidationError, where: str) -> str:
    """Describes a row's errors, one per line: the place, and what was expected there."""
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        problems.append(f"{where}{f', field {field}' if field else ''}: {problem['msg']}")
    return "\n".join([*problems, "Correct or remove the row."])
