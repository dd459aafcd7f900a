"""What a row of a data file must look like."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from klear_megatron.data.files import Row, read_rows
from klear_megatron.data.livecodebench import LiveCodeBenchRow
from klear_megatron.errors import UserError

Message = dict[str, str]
NonEmptyText = Annotated[str, Field(min_length=1)]
OnBadRow = Callable[[UserError], object]


@dataclass(frozen=True)
class Prompt:
    """A problem to be answered, and what its answer is checked against.

    `data_source` chooses the verifier; `index` is the number of the row, from 0, among those read.
    """

    data_source: str
    messages: list[Message]
    ground_truth: str | list[str]
    index: int


@dataclass(frozen=True)
class Conversation:
    """A worked example for SFT; `index` is the number of the row, from 0, among those read."""

    messages: list[Message]
    index: int


class _Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _RewardModel(BaseModel):
    ground_truth: str | list[str]
    style: str | None = None

    # Plain, because pydantic's own report of a failed union is two errors with odd field names.
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
    """Read problems, in Klear's format or LiveCodeBench's, from one or several data sets.

    Args:
        path: each as `read_rows` takes it; read one after another.
        on_bad_row: is given the error of each malformed row, which is then skipped; without it,
            the first such error is raised.

    Raises:
        UserError: no such file, no rows, or a malformed row (file, line and field are named).
    """
    return _read_all(path, parse_prompt, on_bad_row)


def read_conversations(
    path: Path | Sequence[Path], on_bad_row: OnBadRow | None = None
) -> list[Conversation]:
    """Read SFT rows, `{"messages": [{"role", "content"}, ...]}`; otherwise like `read_prompts`."""
    return _read_all(path, _parse_conversation, on_bad_row)


def parse_prompt(row: Row, index: int) -> Prompt:
    """Raises ValidationError."""
    if "question_content" in row:
        problem = LiveCodeBenchRow.model_validate(row)
        return Prompt(problem.data_source, problem.messages, problem.ground_truth, index)
    parsed = _KlearRow.model_validate(row)
    messages = [message.model_dump() for message in parsed.prompt]
    return Prompt(parsed.data_source, messages, parsed.reward_model.ground_truth, index)


def parse_rows(
    path: Path, parse: Callable[[Row, int], Parsed], on_bad_row: OnBadRow | None, start: int = 0
) -> Iterator[tuple[Row, Parsed]]:
    """Streams the rows of a data set, as they are and parsed; they are numbered from `start`.

    `parse(row, index)` raises ValidationError, or a UserError that begins with the field.
    """
    for index, (where, row) in enumerate(read_rows(path), start):
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


def _parse_conversation(row: Row, index: int) -> Conversation:
    parsed = _ConversationRow.model_validate(row)
    return Conversation([message.model_dump() for message in parsed.messages], index)


def _read_all(
    path: Path | Sequence[Path], parse: Callable[[Row, int], Parsed], on_bad_row: OnBadRow | None
) -> list[Parsed]:
    rows: list[Parsed] = []
    bad_rows = 0

    def skip(error: UserError) -> None:
        nonlocal bad_rows
        if on_bad_row is None:
            raise error
        bad_rows += 1
        on_bad_row(error)

    for one in [path] if isinstance(path, Path) else path:
        before = len(rows)
        # Bad rows have numbers too, so that no two rows share one.
        start = before + bad_rows
        rows += (parsed for _, parsed in parse_rows(one, parse, skip, start))
        if len(rows) == before:
            raise UserError(f"{one}: the data file has no rows")
    return rows


def _describe(error: ValidationError, where: str) -> str:
    """One line per problem of a row: where it is, and what should have been there."""
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        problems.append(f"{where}{f', field {field}' if field else ''}: {problem['msg']}")
    return "\n".join([*problems, "Correct or remove the row."])
