"""The conversations of a fine-tuning run, encoded by all ranks together."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data import note_on_repeats
from klear_megatron.data.encoded import EncodedConversations, EncodedPart, encode_part
from klear_megatron.data.files import stamps
from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.platform import objects
from klear_megatron.sft.config import SFTConfig
from klear_megatron.training import run


def read_examples(config: SFTConfig, model: ModelFolder) -> EncodedConversations:
    """Collective. Encodes the conversations and reports how many are too long and left out.

    The encoding is kept in `encoded/` under the run directory, and used again by a resumed run with
    the same data and tokenizer.

    Raises:
        UserError: on all ranks: a malformed row, no conversation short enough, or a length limit
            beyond the model's positions.
    """
    _check_length(config, model)
    folder = config.run_dir / "encoded"
    settings = _what_decides(config)
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
        parts = _encode(config, model.tokenizer, folder)
        if run.is_main_rank():
            record.write_text(json.dumps({"of": settings, "parts": [vars(part) for part in parts]}))
    else:
        parts = [EncodedPart(**part) for part in found["parts"]]
    _report(config, parts)
    return EncodedConversations(folder, len(parts))


def _check_length(config: SFTConfig, model: ModelFolder) -> None:
    positions = model.config.max_position_embeddings
    if config.data.max_length > positions:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens, but the model takes {positions} "
            "(max_position_embeddings of its config.json); lower it, or extend the model by YaRN"
        )


def _what_decides(config: SFTConfig) -> dict[str, Any]:
    path = config.data.path
    files = []
    for one in [path] if isinstance(path, Path) else path:
        files += [one, *one.rglob("*")]
    model = config.policy.hf_folder
    tokenizer = [file for file in model.iterdir() if file.suffix != ".safetensors"]
    return config.data.model_dump(mode="json") | {"files": stamps([*files, *tokenizer])}


def _encode(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[EncodedPart]:
    mine: EncodedPart | UserError
    try:
        mine = encode_part(
            config.data, tokenizer, folder, part=dist.get_rank(), parts=dist.get_world_size()
        )
    except UserError as error:
        mine = error
    parts = []
    for one in objects.all_gather(mine):
        if isinstance(one, UserError):
            raise one
        parts.append(one)
    return parts


def _report(config: SFTConfig, parts: list[EncodedPart]) -> None:
    total = EncodedPart(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))
    limit = f"more than {config.data.max_length} tokens (data.max_length)"
    if not total.kept:
        raise UserError(f"data: no conversation is left: {total.too_long} have {limit}")
    for note in notes(config, total) if run.is_main_rank() else ():
        say(note)


def notes(config: SFTConfig, total: EncodedPart) -> list[str]:
    """Lines for the user about conversations that are left out, or repeated in a step."""
    lines = []
    if total.bad_rows:
        lines.append(f"data: {total.bad_rows} malformed rows skipped")
    if total.too_long:
        limit = f"more than {config.data.max_length} tokens (data.max_length)"
        of = total.kept + total.too_long
        lines.append(f"data: {total.too_long} of {of} conversations have {limit} and are left out")
    if rest := total.kept * config.epochs % config.batch_size:
        lines.append(
            f"data: of {total.kept} conversations x {config.epochs} epochs, the last {rest} make "
            f"no whole batch of {config.batch_size} (batch_size) and are not trained"
        )
    return lines + note_on_repeats(total.kept, config.batch_size, "batch_size")
