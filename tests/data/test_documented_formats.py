"""docs/data.md shows rows and the YAML that reads them: it does."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from klear_megatron.config import Section, load_config
from klear_megatron.data import ConversationsConfig, DataConfig, Prompt, load_prompts
from klear_megatron.data.encoded import encode_part
from klear_megatron.data.rows import parse_conversation, parse_rows
from klear_megatron.rewards import RewardConfig
from klear_megatron.rewards.graders import verifier_of
from tests.commands import ROOT
from tests.data.test_encoding import CHATML, make_tokenizer

TEXT = (ROOT / "docs" / "data.md").read_text()
SECTIONS = [section.partition("\n") for section in re.split(r"^##+ ", TEXT, flags=re.MULTILINE)]
EXAMPLES = {
    title: (json.loads(found[1]), found[2])
    for title, _, body in SECTIONS
    if (found := re.search(r"```json\n(.*)\n```\n\n```yaml\n(.*?)```", body, re.DOTALL))
}
PROMPTS: dict[str, tuple[str, dict[str, str]]] = {
    "Klear-Reasoner and verl": ("1+1?", {"split": "train"}),
    "slime": ("1+1?", {}),
    "GSM8K": (
        "Ann has one egg and buys one. How many are there? Put the answer in \\boxed{}.",
        {},
    ),
}
CONVERSATIONS = {
    "Messages": ("1+1?", "<think>easy</think>2"),
    "ShareGPT": ("1+1?", "2"),
    "Alpaca": ("Add the numbers.\n\n1 and 1", "2"),
    "A table": ("1+1?", "2"),
    "TRL": ("1+1?", "2"),
}


class RL(Section):
    data: DataConfig
    rewards: RewardConfig = RewardConfig()


class SFT(Section):
    data: ConversationsConfig


def write(path: Path, row: dict[str, Any]) -> Path:
    """The row in a file of the kind that its name says; the hub's rows in one of JSON Lines."""
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        case ".csv":
            with path.open("w", encoding="utf-8-sig", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerow(row)
        case ".json":
            path.write_text(json.dumps([row]), encoding="utf-8-sig")
        case _:
            path = path.with_name("hub.jsonl")
            path.write_text(json.dumps(row) + "\n", encoding="utf-8-sig")
    return path


def config_of(cls: type[Section], title: str, folder: Path) -> Any:
    """The documented config, with a file in the place of a data set on the hub."""
    row, settings = EXAMPLES[title]
    values = yaml.safe_load(settings)
    values["data"]["path"] = str(write(folder / Path(values["data"]["path"]).name, row))
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    config: Any = load_config(cls, folder / "config.yaml")
    data = config.data.model_copy(update={"subset": None, "split": None})
    return config.model_copy(update={"data": data})


def test_every_example_is_tested():
    assert EXAMPLES.keys() == PROMPTS.keys() | CONVERSATIONS.keys()


@pytest.mark.parametrize("title", PROMPTS)
def test_prompts_are_read_by_the_documented_settings(tmp_path, title):
    config = config_of(RL, title, tmp_path)
    (prompt,) = load_prompts(config.data, make_tokenizer(CHATML)).prompts
    content, extra_info = PROMPTS[title]
    messages = [{"role": "user", "content": content}]
    assert prompt == Prompt(prompt.data_source, messages, "2", 0, extra_info)
    assert verifier_of(prompt.data_source, config.rewards.sources) == "math"


@pytest.mark.parametrize("title", CONVERSATIONS)
def test_conversations_are_read_by_the_documented_settings(tmp_path, title):
    config = config_of(SFT, title, tmp_path)
    question, answer = CONVERSATIONS[title]
    ((_, conversation),) = parse_rows(
        config.data.path, lambda row, index: parse_conversation(row, index, config.data)
    )
    assert conversation.messages == [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    assert encode_part(config.data, make_tokenizer(CHATML), tmp_path, part=0, parts=1).kept == 1
