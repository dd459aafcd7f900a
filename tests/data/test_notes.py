"""What a run says about rows that are left out, or that a step takes more than once."""

import pytest

from klear_megatron.data import note_on_repeats
from klear_megatron.data.encoded import EncodedPart
from klear_megatron.sft.config import SFTConfig
from klear_megatron.sft.data import training_notes


@pytest.mark.parametrize(
    ("kept", "epochs", "batch_size", "said"),
    [
        (10, 2, 8, ["of 10 conversations x 2 epochs, the last 4 make no whole batch of 8"]),
        (8, 2, 8, []),
        (3, 8, 8, ["3 rows, but a step takes 8 (batch_size): some of them repeatedly"]),
    ],
)
def test_conversations_without_a_whole_batch_and_repeated_ones_are_said(
    kept, epochs, batch_size, said
):
    config = SFTConfig.model_validate(
        {
            "run_dir": "run",
            "policy": {"path": "model", "optimizer": {"lr": 1}},
            "data": {"path": "rows.jsonl"},
            "epochs": epochs,
            "batch_size": batch_size,
        }
    )
    lines = training_notes(config, EncodedPart(kept=kept))
    assert len(lines) == len(said)
    assert all(what in line for what, line in zip(said, lines, strict=True))


def test_with_steps_it_is_said_how_much_of_the_data_they_are():
    config = SFTConfig.model_validate(
        {
            "run_dir": "run",
            "policy": {"path": "model", "optimizer": {"lr": 1}},
            "data": {"path": "rows.jsonl"},
            "steps": 3,
            "batch_size": 8,
        }
    )
    (said,) = training_notes(config, EncodedPart(kept=10))
    expected = "3 steps (steps) x 8 (batch_size) = 24 conversations: 2.40 times the data"
    assert said == f"data: {expected}"


def test_prompts_that_repeat_within_a_step_are_said():
    assert note_on_repeats(3, 8, "prompts_per_step") == [
        "data: 3 rows, but a step takes 8 (prompts_per_step): some of them repeatedly"
    ]
    assert note_on_repeats(8, 8, "prompts_per_step") == []
