"""Messages of a chat, in the forms in which they are published."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from klear_megatron.errors import UserError

Message = dict[str, Any]
"""`role` and `content`, a text each, and whatever else the chat template may use."""

INSTEAD_OF_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys with which an assistant's message may do without content. If a template did not use one of
them, what the model is to learn would be missing."""

_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    weight: Literal[0, 1] = 1
    """0 keeps an assistant's message out of the loss."""

    @model_validator(mode="before")
    @classmethod
    def _in_one_form(cls, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        # A Parquet file has every key of some message in all messages, as null.
        message = {key: value for key, value in message.items() if value is not None}
        if "from" in message and "role" not in message:
            role, message["content"] = message.pop("from"), message.pop("value", None)
            message["role"] = _SHARE_GPT_ROLES.get(role, role)
        if any(message.get(key) for key in INSTEAD_OF_TEXT):
            message.setdefault("content", "")
        return message

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                raise PydanticCustomError("content", "Every part should be of type text")
            texts.append(text)
        return "".join(texts)


_MESSAGES = TypeAdapter(list[_Message])


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages, and no list of parts of a content."""
    return isinstance(value, list) and all(
        isinstance(one, Mapping) and one.keys() & {"role", "from"} for one in value
    )


def read_messages(value: Any, field: str) -> list[Message]:
    """The messages that a row has; a text is one message of the user's.

    Args:
        field: the row's column, for messages of errors.

    Raises:
        UserError: malformed messages; each line begins with the field.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    try:
        parsed = _MESSAGES.validate_python(value)
    except ValidationError as error:
        raise UserError(describe(error, field)) from error
    if not parsed:
        raise UserError(f"{field}: List should have at least 1 item after validation, not 0")
    return [message.model_dump(exclude_unset=True) for message in parsed]


def describe(error: ValidationError, *outer: str) -> str:
    """The problems of a row or of the part of it in `outer`: a line for each, with its field."""
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join([*outer, *map(str, problem["loc"])])
        lines.append(f"{field}: {problem['msg']}")
    return "\n".join(lines)
