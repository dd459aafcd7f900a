"""The conversations of a fine-tuning run, encoded by all ranks together."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data import ConversationsConfig, note_on_repeats
from klear_megatron.data.chat_template import ends_turns
from klear_megatron.data.encoded import EncodedConversations, EncodedPart, encode_part
from klear_megatron.data.files import check_paths, stamps
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training import run


def read_examples(config: SFTConfig, model: ModelFolder) -> EncodedConversations:
    """Collective. Encodes the conversations to train on and says which are left out.

    The encoding is kept in `encoded/` under the run directory, and used again by a resumed run with
    the same data and tokenizer.

    Raises:
        UserError: on all ranks: a malformed row, or no conversation short enough.
    """
    examples, total = _read(config.data, model, config.run_dir / "encoded")
    _say([*training_notes(config, total), *end_notes(model)])
    return examples


def read_validation(config: SFTConfig, model: ModelFolder) -> EncodedConversations | None:
    """Collective. As `read_examples`, the held-out conversations; None if there are to be none."""
    if config.validation_data is None:
        return None
    data = config.validation_data
    examples, total = _read(data, model, config.run_dir / "encoded_validation")
    _say(notes(data, total, "validation"))
    return examples


def check_before_reading(config: SFTConfig, model: ModelFolder) -> None:
    """Checks what can be known before conversations are encoded, which may take long.

    Raises:
        UserError: there are no such data, or a length limit is beyond the model's positions.
    """
    for data in (config.data, config.validation_data):
        if data is not None:
            check_paths(data.path, data.subset, data.split)
    positions = model.config.max_position_embeddings
    if config.data.max_length > positions:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens, but the model takes {positions} "
            "(max_position_embeddings of its config.json); lower it, or extend the model by YaRN"
        )


def _read(
    data: ConversationsConfig, model: ModelFolder, folder: Path
) -> tuple[EncodedConversations, EncodedPart]:
    settings = _what_decides(data, model)
    record = folder / "complete.json"
    found: dict[str, Any] | None = None
    if run.is_main_rank():
        if record.exists() and (stored := json.loads(record.read_text()))["of"] == settings:
            found = stored
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
    found = objects.broadcast(found)
    if found is None:
        parts = _encode(data, model.tokenizer, folder)
        if run.is_main_rank():
            record.write_text(json.dumps({"of": settings, "parts": [vars(part) for part in parts]}))
    else:
        parts = [EncodedPart(**part) for part in found["parts"]]
    total = EncodedPart(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))
    check_any_left(data, total)
    return EncodedConversations(folder, len(parts)), total


def _what_decides(data: ConversationsConfig, model: ModelFolder) -> dict[str, Any]:
    files = []
    for one in data.paths:
        files += [one, *one.rglob("*")]
    tokenizer = [file for file in model.path.iterdir() if file.suffix != ".safetensors"]
    return {
        **data.model_dump(mode="json"),
        "chat_template": model.chat_template,
        "files": stamps([*files, *tokenizer]),
    }


def _encode(
    data: ConversationsConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[EncodedPart]:
    mine: EncodedPart | UserError
    try:
        mine = encode_part(
            data, tokenizer, folder, part=dist.get_rank(), parts=dist.get_world_size()
        )
    except UserError as error:
        mine = error
    parts = []
    for one in objects.all_gather(mine):
        if isinstance(one, UserError):
            raise one
        parts.append(one)
    return parts


def check_any_left(data: ConversationsConfig, total: EncodedPart) -> None:
    """Raises UserError if no conversation is short enough."""
    if not total.kept:
        raise UserError(
            f"{data.path}: no conversation is left: {total.too_long} have more than "
            f"{data.max_length} tokens (data.max_length)"
        )


def _say(lines: list[str]) -> None:
    for line in lines if run.is_main_rank() else ():
        say(line)


def notes(data: ConversationsConfig, total: EncodedPart, name: str) -> list[str]:
    """Lines for the user about conversations that are left out.

    Args:
        name: the config's section.
    """
    lines = []
    if total.bad_rows:
        lines.append(f"{name}: {total.bad_rows} malformed rows skipped")
    if total.too_long:
        limit = f"more than {data.max_length} tokens (data.max_length)"
        of = total.kept + total.too_long
        lines.append(f"{name}: {total.too_long} of {of} conversations have {limit}: left out")
    return lines


def training_notes(config: SFTConfig, total: EncodedPart) -> list[str]:
    """As `notes`, and about those that make no whole batch, or are repeated in a step."""
    lines = notes(config.data, total, "data")
    if config.steps is not None:
        used = config.steps * config.batch_size
        lines.append(
            f"data: {config.steps} steps (steps) x {config.batch_size} (batch_size) = {used} "
            f"conversations: {used / total.kept:.2f} times the data"
        )
    elif rest := total.kept * config.epochs % config.batch_size:
        lines.append(
            f"data: of {total.kept} conversations x {config.epochs} epochs, the last {rest} make "
            f"no whole batch of {config.batch_size} (batch_size) and are not trained"
        )
    return lines + note_on_repeats(total.kept, config.batch_size, "batch_size")


def end_notes(model: ModelFolder) -> list[str]:
    """A line for the user if what is trained does not teach the model to end its turn."""
    try:
        if ends_turns(model.tokenizer, model.stop_token_ids):
            return []
    except UserError:  # a template that takes other messages only
        return []
    stops = ", ".join(map(repr, model.tokenizer.convert_ids_to_tokens(model.stop_token_ids)))
    return [
        "warning: the chat template ends an assistant's turn without a token at which servers stop "
        f"({stops}): the model would not learn to end its responses. Let the template write one, "
        "or name its own in eos_token_id of generation_config.json"
    ]


def count_steps(config: SFTConfig, conversations: int) -> int:
    """Optimizer steps of the whole run.

    Raises:
        UserError: the conversations make no whole batch.
    """
    steps = config.steps or conversations * config.epochs // config.batch_size
    if steps == 0:
        raise UserError(
            f"batch_size: {config.batch_size} conversations a step, but data.path has "
            f"{conversations} x {config.epochs} epochs"
        )
    return steps
