"""The tokenizer of a Hugging Face checkpoint, and the tokens that end a response."""

from collections.abc import Sequence
from pathlib import Path

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
    """Token ids that end a response: from generation_config.json if given there, or the tokenizer.

    Raises:
        UserError: neither names one, so no response would ever end.
    """
    stop = None
    if (path / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(path).eos_token_id
    if stop is None:
        stop = tokenizer.eos_token_id
    if stop is None:
        raise UserError(
            f"{path}: neither generation_config.json nor the tokenizer names an eos_token_id"
        )
    return stop if isinstance(stop, list) else [stop]


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text that rewards read: the response without control tokens such as the end of turn."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str), "a list of ids is one text"
    return text
