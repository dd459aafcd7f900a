"""The tokenizer of a Hugging Face checkpoint, and the tokens that end a response."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from klear_megatron.errors import UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def is_template(given: str) -> bool:
    """Whether it is a chat template itself, and not the name of a file."""
    return "{{" in given or "{%" in given


def read_template(given: str, setting: str) -> str:
    """A chat template: the text of the file that `given` names, or `given` itself.

    Args:
        setting: the config key that holds it, for the message.

    Raises:
        UserError: there is no such file.
    """
    if is_template(given):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{setting}: {given}: cannot be read: {error}; give a file with a Jinja template, or "
            "the template itself"
        ) from error


def read_tokenizer(path: Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder.

    Args:
        vocab_size: the model's, of its config.json.

    Raises:
        UserError: there is none, it cannot be read, or it has a token that the model has not.
    """
    # Without these files, transformers makes up an empty tokenizer from the model's type.
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{path}: no tokenizer there: none of {', '.join(_TOKENIZER_FILES)}; copy the base "
            "model's into the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: no tokenizer can be read there: {why_not_read(error)}") from error
    if vocab_size is not None:
        _check_ids(tokenizer, vocab_size, path)
    return tokenizer


def why_not_read(error: Exception) -> str:
    """What transformers says about a folder, without its advice to run the folder's code."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code that lies there (auto_map), which is never run; use a model that "
            "transformers knows"
        )
    return str(error)


def _check_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, path: Path) -> None:
    """The rows beyond vocab_size are padding: they would be trained, and lost in a conversion."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise UserError(
            f"{path}: the tokenizer's token {token!r} has the id {highest}, but the model's "
            f"vocab_size is {vocab_size}; use the model's own tokenizer, or enlarge the model with "
            "resize_token_embeddings of transformers and save both"
        )


def read_stop_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a response: from generation_config.json if given there, or the tokenizer;
    and the one that ends a turn in the chat template, which a base model's files do not name.

    Raises:
        UserError: none of them names one, so no response would ever end.
    """
    stop = None
    if (path / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(path).eos_token_id
    if stop is None:
        stop = tokenizer.eos_token_id
    ids = _as_list(stop)
    end = end_of_turn(tokenizer)
    if end is not None and end not in ids:
        ids = [*ids, end]
    if not ids:
        raise UserError(
            f"{path}: neither generation_config.json nor the tokenizer names an eos_token_id, and "
            "the chat template ends no turn with a special token"
        )
    return ids


def name_stop_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets the folder's generation_config.json name the token that ends a turn, if it does not."""
    end, file = end_of_turn(tokenizer), path / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = _as_list(values.get("eos_token_id", tokenizer.eos_token_id))
    if end is None or end in named:
        return
    ids = read_stop_token_ids(path, tokenizer)
    file.write_text(json.dumps(values | {"eos_token_id": ids}, indent=2) + "\n", encoding="utf-8")


def _as_list(stop: int | list[int] | None) -> list[int]:
    if isinstance(stop, list):
        return stop
    return [] if stop is None else [stop]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the special token that ends the assistant's turn in the chat template; None if
    there is no template, or no such token, or the template refuses a plain question and answer."""
    turn = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    try:
        ids = cast(list[int], tokenizer.apply_chat_template(turn, return_dict=False))
    except Exception:  # there is none, or it wants other messages and raises whatever it likes
        return None
    last = ids[trained_end(tokenizer, ids) - 1]
    token = tokenizer.added_tokens_decoder.get(last)
    return last if token is not None and token.special else None


def trained_end(tokenizer: PreTrainedTokenizerBase, turn: list[int], start: int = 0) -> int:
    """Where the trained tokens of a turn end: what follows the end-of-turn token, such as a
    newline, is not the assistant's to generate."""
    end = len(turn)
    while end > start and not cast(str, tokenizer.decode(turn[end - 1 : end])).strip():
        end -= 1
    return end


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text that rewards read: the response without control tokens such as the end of turn."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str), "a list of ids is one text"
    return text
