"""What a fine-tuning run would do."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data import ConversationsConfig
from klear_megatron.data.encoded import EncodedPart, encode_part
from klear_megatron.sft.config import SFTConfig
from klear_megatron.sft.data import (
    check_any_left,
    check_before_reading,
    count_steps,
    end_notes,
    notes,
    training_notes,
)
from klear_megatron.training import run
from klear_megatron.training.dry_run import describe_run


def describe_sft(config: SFTConfig, ranks: int) -> Iterator[str]:
    """Lines: the settings, the plan, rows read and left out, and steps.

    Raises:
        UserError: what the run itself would refuse before its first step.
    """
    config = run.with_model_here(config)
    folder = run.model_folder(config)
    check_before_reading(config, folder)
    yield from describe_run(config, folder, ranks)
    total = _encode(config.data, folder)
    yield f"data: {total.kept} conversations to train on"
    yield from training_notes(config, total)
    yield from end_notes(folder)
    if config.validation_data is not None:
        held_out = _encode(config.validation_data, folder)
        yield f"validation: {held_out.kept} conversations"
        yield from notes(config.validation_data, held_out, "validation")
    yield f"steps: {count_steps(config, total.kept)}"


def _encode(data: ConversationsConfig, folder: ModelFolder) -> EncodedPart:
    with tempfile.TemporaryDirectory() as temporary:
        total = encode_part(data, folder.tokenizer, Path(temporary), part=0, parts=1)
    check_any_left(data, total)
    return total
