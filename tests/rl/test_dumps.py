"""Responses token by token: in the files of a step, and as they are printed."""

import math
from dataclasses import replace

import pytest
import torch

from klear_megatron.observability import RolloutFiles
from klear_megatron.rl.batches import batch_of
from klear_megatron.rl.dumps import Dumps
from klear_megatron.rl.show import listed, token_by_token
from tests.rl.test_groups import config_of
from tests.rl.test_sharing import group


def with_log_probs(made, log_probs):
    responses = [
        replace(response, log_probs=log_probs[: len(response.token_ids)])
        for response in made.responses
    ]
    return replace(made, responses=responses)


@pytest.fixture
def rows(tmp_path):
    """A group that is trained, one in which all are right, and one beyond the limit."""
    config = config_of(tmp_path)
    made = [
        with_log_probs(group(*one), [-0.5, math.nan, -0.25])
        for one in (
            ([1, 2], [[3], [4, 5, 6]], [1.0, -1.0]),
            ([7], [[8], [9]], [1.0, 1.0]),
            ([10], [[11], [12]], [1.0, -1.0]),
        )
    ]
    trained = batch_of(made[:1], config)
    old = torch.tensor([0.0, 0.0, -0.5000004, 0.0, 0.0, -1.0, -2.0, -3.0])
    clipped = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    batch = trained.with_fields(old_log_probs=old, clipped=clipped)
    dumps = Dumps(config, 0)
    dumps.write_texts(4, made)
    dumps.write_tokens(4, made, batch, slice(0, 2))
    return list(RolloutFiles(config.run_dir).read(4))


def test_each_token_has_its_id_both_log_probs_and_the_mask(rows):
    assert [row["token_ids"] for row in rows] == [[3], [4, 5, 6], [8], [9], [11], [12]]
    assert [row["prompt_ids"] for row in rows] == [[1, 2]] * 2 + [[7]] * 2 + [[10]] * 2
    assert rows[1]["rollout_log_probs"] == [-0.5, None, -0.25]
    assert rows[0]["old_log_probs"] == [-0.5]
    assert rows[1]["old_log_probs"] == [-1.0, -2.0, -3.0]
    # A token whose server's log-probability is not finite is not trained.
    assert rows[1]["mask"] == [1, 0, 1]
    assert [row["mask"] for row in rows[2:]] == [None] * 4
    assert [row["clipped"] for row in rows] == [[1], [0, 0, 2], *[None] * 4]


def test_a_response_is_printed_token_by_token(rows):
    printed = [line.split() for line in token_by_token(rows[1], str)]
    assert printed[-3:] == [
        ["0", "4", "-0.5000", "-1.0000", "-0.5000", "yes", "'[4]'"],
        ["1", "5", "-", "-2.0000", "-", "no", "'[5]'"],
        ["2", "6", "-0.2500", "-3.0000", "-2.7500", "yes", "'[6]'"],
    ]
    (line,) = list(listed([(1, rows[1])]))[1:]
    assert line.split() == ["1", "0", "-1.00", "no", "3", "stop", "yes", "2.7500", "''"]
