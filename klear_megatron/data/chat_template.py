"""Messages through the tokenizer's chat template, and what the template makes of them."""

from collections.abc import Collection, Sequence
from typing import Any, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from klear_megatron.data.messages import INSTEAD_OF_TEXT, Message
from klear_megatron.errors import UserError


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the tokenizer has no chat template, or one that is not Jinja."""
    _check_there_is_one(tokenizer)
    asked = [{"role": "user", "content": "1+1?"}]
    try:
        tokenizer.apply_chat_template(asked, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            "the chat template (chat_template of the config, or else that of "
            f"{tokenizer.name_or_path}) is not Jinja: line {error.lineno}: {error.message}"
        ) from error
    except Exception:  # noqa: S110 - it may refuse this message, and take those of the rows
        pass


def _check_there_is_one(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; add one")


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """The token ids of the messages, with the opening of the assistant's turn where wanted.

    Raises:
        UserError: there is no template, or it fails on these messages.
    """
    ids = _apply(tokenizer, messages, tools, add_generation_prompt, tokenize=True)
    return cast(list[int], ids)


def text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """As `token_ids`, but the text that they stand for."""
    return cast(str, _apply(tokenizer, messages, tools, add_generation_prompt, tokenize=False))


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the `<think>` of a response itself, at the end of a prompt."""
    asked = [{"role": "user", "content": "1+1?"}]
    return text(tokenizer, asked, add_generation_prompt=True).rstrip().endswith("<think>")


def ends_turns(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int]) -> bool:
    """Whether the template ends an assistant's turn with one of these tokens."""
    asked: list[Message] = [{"role": "user", "content": "1+1?"}]
    before = token_ids(tokenizer, asked, add_generation_prompt=True)
    whole = token_ids(tokenizer, [*asked, {"role": "assistant", "content": "2"}])
    return any(token in stop_token_ids for token in whole[len(before) :])


def check_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any]
) -> None:
    """Checks that the last message, an assistant's, is trained as a whole and nothing besides.

    Raises:
        UserError: the template makes the same of the message without its reasoning or tool calls,
            or it writes the header of the turn only together with the message.
    """
    *before, last = messages
    field = f"messages.{len(before)}"
    for key in filter(last.get, INSTEAD_OF_TEXT):
        less = {name: value for name, value in last.items() if name != key}
        if text(tokenizer, [*before, less], tools) == text(tokenizer, messages, tools):
            raise UserError(
                f"{field}.{key}: the chat template does not use it, so it would not be trained; "
                "use a template that does, or write it into the content"
            )
    if "add_generation_prompt" not in str(tokenizer.chat_template):
        opened, whole = text(tokenizer, before, tools), text(tokenizer, messages, tools)
        said = str(last.get("reasoning_content") or last["content"]).strip()
        header = whole.removeprefix(opened).partition(said)[0].replace("<think>", "").strip()
        if said and header and said in whole:
            raise UserError(
                f"{field}: the chat template does nothing for add_generation_prompt, so the header "
                f"of the assistant's turn, {header!r}, would be trained, and be missing when a "
                "response is drawn; let the template write it there"
            )


def check_tools_are_used(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any]
) -> None:
    """Raises UserError if the template makes the same of the messages without the tools."""
    if tools and text(tokenizer, messages, tools) == text(tokenizer, messages):
        raise UserError(
            "tools: the chat template does not use them, so the model would not see them; use a "
            "template that does, or write them into the system message"
        )


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any],
    add_generation_prompt: bool,
    *,
    tokenize: bool,
) -> object:
    _check_there_is_one(tokenizer)
    if "developer" not in str(tokenizer.chat_template):
        # OpenAI's newer name of the system role. Many templates leave out a role they do not know.
        messages = [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            return_dict=False,
        )
    except Exception as error:  # a template may raise anything
        said = " ".join(str(error).split())
        raise UserError(
            f"messages: the chat template of {tokenizer.name_or_path} fails here: "
            f"{type(error).__name__}: {said}"
        ) from error
