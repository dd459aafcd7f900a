"""Turns messages into token ids, always through the tokenizer's chat template."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from klear_megatron.data import chat_template
from klear_megatron.data.messages import Message
from klear_megatron.data.rows import Prompt, is_trained
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import trained_end


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> list[int]:
    """Token ids of the messages, followed by the opening of the assistant's turn."""
    return chat_template.token_ids(tokenizer, messages, tools, add_generation_prompt=True)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and the mask of the trained ones.

    The mask is 1 on the tokens that the assistant has to generate, its end-of-turn token included,
    and 0 elsewhere, as in messages of `weight` 0; both lists have the same length. An assistant
    message's tokens are those that the template adds to the prompt before it, so
    `encode_prompt(messages[:i])` followed by the trained tokens of message i is exactly what
    generation sees and produces.

    Raises:
        UserError: the template or the tokenizer changes earlier tokens when a message is added,
            so no message has tokens of its own; or the template leaves out a part of a message or
            the tools, does not open the assistant's turn, or fails.
    """
    ids = chat_template.token_ids(tokenizer, messages, tools)
    chat_template.check_tools_are_used(tokenizer, messages, tools)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if not is_trained(message):
            continue
        chat_template.check_turn(tokenizer, messages[: i + 1], tools)
        prompt = encode_prompt(tokenizer, messages[:i], tools)
        turn = chat_template.token_ids(tokenizer, messages[: i + 1], tools)
        if turn[: len(prompt)] != prompt or ids[: len(turn)] != turn:
            raise UserError(
                f"messages.{i}: the chat template encodes the messages before or at this one "
                "differently once a later one follows, so its tokens cannot be told apart. Some "
                "templates drop the reasoning of earlier turns: make each assistant turn the last "
                "one of a row of its own, or use another chat template"
            )
        start = len(prompt)
        end = trained_end(tokenizer, turn, start)
        mask[start:end] = [1] * (end - start)
    return ids, mask


def cut_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int
) -> tuple[Prompt, list[int]]:
    """Cuts the start of the prompt's longest message so that it fits; returns it and its token ids.

    The end is kept, where the question usually is: as many characters as fit.

    Raises:
        UserError: the prompt would not fit even without that message.
    """
    longest = max(range(len(prompt.messages)), key=lambda i: len(prompt.messages[i]["content"]))
    content = prompt.messages[longest]["content"]

    def shortened(characters: int) -> tuple[Prompt, list[int]]:
        messages = [dict(message) for message in prompt.messages]
        messages[longest]["content"] = content[len(content) - characters :]
        return replace(prompt, messages=messages), encode_prompt(tokenizer, messages)

    fits, too_many = 0, len(content)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(shortened(middle)[1]) <= max_length:
            fits = middle
        else:
            too_many = middle
    cut, ids = shortened(fits)
    if len(ids) > max_length:
        raise UserError(
            f"max_prompt_length: row {prompt.index} does not fit {max_length} tokens even "
            "without its longest message; raise the limit, or drop long prompts"
        )
    return cut, ids
