"""Conversations are encoded in parts, with and without real ranks."""

import json
import os
import random
from pathlib import Path

import pytest
import torch.distributed as dist

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.data import ConversationsConfig, encode_conversation
from klear_megatron.data.encoded import EncodedConversations, encode_part
from klear_megatron.errors import UserError
from klear_megatron.sft.config import SFTConfig
from klear_megatron.sft.data import read_examples
from tests.data.test_encoding import CHATML, make_tokenizer, random_conversation
from tests.distributed.ranks import run_ranks
from tests.models import tiny

TOKENIZER = make_tokenizer(CHATML)
LIMIT = 160


@pytest.fixture
def conversations(tmp_path):
    """The conversations in two files."""
    rng = random.Random(0)
    rows = [random_conversation(rng) for _ in range(700)]
    write(tmp_path / "a.jsonl", rows[:300])
    write(tmp_path / "b.jsonl", rows[300:])
    return rows


def write(path, rows, between=""):
    path.write_text(between.join(json.dumps({"messages": row}) + "\n" for row in rows))


def as_lists(examples):
    return [tuple(values.tolist() for values in examples[i]) for i in range(len(examples))]


def expected(rows):
    encoded = [encode_conversation(TOKENIZER, row) for row in rows]
    return [(tokens, mask) for tokens, mask in encoded if len(tokens) <= LIMIT]


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_together_are_the_whole_in_its_order(tmp_path, conversations, parts):
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    config = ConversationsConfig(path=paths, max_length=LIMIT)
    done = [encode_part(config, TOKENIZER, tmp_path, part=i, parts=parts) for i in range(parts)]
    examples = EncodedConversations(tmp_path, parts)
    assert as_lists(examples) == expected(conversations)
    assert 0 < len(examples) < len(conversations)
    assert sum(part.kept for part in done) == len(examples)
    assert sum(part.kept + part.too_long for part in done) == len(conversations)


def test_a_malformed_row_belongs_to_one_part(tmp_path, conversations):
    write(tmp_path / "bad.jsonl", conversations[:4], between='{"messages"\n{"messages": []}\n')
    config = ConversationsConfig(path=tmp_path / "bad.jsonl", max_length=LIMIT, bad_rows="skip")
    done = [encode_part(config, TOKENIZER, tmp_path, part=i, parts=2) for i in range(2)]
    assert [part.bad_rows for part in done] == [3, 3]
    assert as_lists(EncodedConversations(tmp_path, 2)) == expected(conversations[:4])


def config_of(folder: Path, **data: object) -> SFTConfig:
    return SFTConfig.model_validate(
        {
            "run_dir": folder / "run",
            "policy": {"path": folder / "model", "optimizer": {"lr": 1}},
            "data": {"path": folder / "a.jsonl", "max_length": LIMIT, **data},
            "batch_size": 1,
        }
    )


def _read(folder: Path, name: str) -> object:
    model = ModelFolder(folder / "model")
    model.tokenizer = TOKENIZER
    try:
        examples = read_examples(config_of(folder, path=folder / name), model)
    except UserError as error:
        return str(error)
    dist.barrier()  # the first rank has written its record
    files = {path.name: path.stat().st_mtime_ns for path in (folder / "run/encoded").iterdir()}
    return as_lists(examples), files


def test_ranks_share_the_work_and_a_run_that_goes_on_has_it_already(tmp_path, conversations):
    tiny.write(tmp_path / "model", tiny.qwen3(num_hidden_layers=1))
    (tmp_path / "run").mkdir()
    first = run_ranks(2, _read, tmp_path, "a.jsonl")
    assert first[0] == first[1]
    rows, files = first[0]
    assert rows == expected(conversations[:300])
    assert files.keys() == {"0.arrow", "1.arrow", "complete.json"}
    assert run_ranks(1, _read, tmp_path, "a.jsonl") == first[:1]

    os.utime(tmp_path / "a.jsonl")
    rows, again = run_ranks(1, _read, tmp_path, "a.jsonl")[0]
    assert rows == expected(conversations[:300])
    assert again.keys() == {"0.arrow", "complete.json"}

    # Both ranks refuse a malformed row that only the second one reads.
    write(tmp_path / "bad.jsonl", [conversations[0], []])
    for message in run_ranks(2, _read, tmp_path, "bad.jsonl"):
        assert "bad.jsonl, line 2, field messages" in message
    assert not (tmp_path / "run/encoded/complete.json").exists()
