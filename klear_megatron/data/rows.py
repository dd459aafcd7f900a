"""What a row of a data file must look like, and reading a file of such rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from klear_megatron.errors import UserError

Message = dict[str, str]
NonEmptyText = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Prompt:
    """A problem to be answered, and what its answer is checked against.

    `data_source` chooses the verifier; `index` is the row number in the file, from 0.
    """

    data_source: str
    messages: list[Message]
    ground_truth: str | list[str]
    index: int


@dataclass(frozen=True)
class Conversation:
    """A worked example for SFT; `index` is the row number in the file, from 0."""

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


Row = TypeVar("Row", bound=BaseModel)


def read_prompts(path: Path) -> list[Prompt]:
    """Read problems in Klear's format from a .jsonl or .parquet file.

    Raises:
        UserError: no such file, no rows, or a malformed row (file, line and field are named).
    """
    return [
        Prompt(
            data_source=row.data_source,
            messages=[message.model_dump() for message in row.prompt],
            ground_truth=row.reward_model.ground_truth,
            index=index,
        )
        for index, row in enumerate(_read_rows(path, _KlearRow))
    ]


def read_conversations(path: Path) -> list[Conversation]:
    """Read SFT rows, `{"messages": [{"role", "content"}, ...]}`, from a .jsonl or .parquet file.

    Raises:
        UserError: no such file, no rows, or a malformed row (file, line and field are named).
    """
    return [
        Conversation(messages=[message.model_dump() for message in row.messages], index=index)
        for index, row in enumerate(_read_rows(path, _ConversationRow))
    ]


def _read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: cannot read this kind of file; give a .jsonl or .parquet file")
    if not path.is_file():
        raise UserError(f"{path}: no such data file; check the path")
    rows = list(readers[path.suffix](path, row_type))
    if not rows:
        raise UserError(f"{path}: the data file has no rows")
    return rows


def _read_jsonl(path: Path, row_type: type[Row]) -> Iterator[Row]:
    # `datasets` could read this too, but it neither keeps line numbers nor lets the type of
    # ground_truth differ from row to row.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield row_type.model_validate_json(line)
                except ValidationError as error:
                    raise UserError(_describe(error, f"{path}, line {number}")) from error


def _read_parquet(path: Path, row_type: type[Row]) -> Iterator[Row]:
    from datasets import load_dataset  # two seconds, which readers of JSONL need not wait

    try:
        # Streaming reads the file itself; otherwise a converted copy is left in the user's home.
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except ValueError as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    for number, row in enumerate(rows, start=1):
        try:
            yield row_type.model_validate(row)
        except ValidationError as error:
            raise UserError(_describe(error, f"{path}, row {number}")) from error


def _describe(error: ValidationError, where: str) -> str:
    """One line per problem of a row: where it is, and what should have been there."""
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        # A row is one line, so the parser's own "line 1" would contradict `where`.
        message = problem["msg"].replace(" at line 1 column", " at column")
        problems.append(f"{where}{f', field {field}' if field else ''}: {message}")
    return "\n".join([*problems, "Correct or remove the row."])
