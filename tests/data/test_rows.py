import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from klear_megatron.data import Conversation, Prompt, read_prompts
from klear_megatron.data.rows import parse_conversation, parse_rows
from klear_megatron.errors import UserError
from klear_megatron.rewards import RewardConfig, RewardPool

# As published by the paper's authors, including keys that we do not read.
AUTHORS_ROW = {
    "data_source": "math_longcot_math_verify",
    "prompt": [{"content": "Let $n=9867$. ...", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "__index_level_0__": "29999",
}
CONVERSATION = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def changed(**changes):
    """The authors' row as JSON, with the keys in `changes` replaced, or dropped where None."""
    row = {**AUTHORS_ROW, **changes}
    return json.dumps({key: value for key, value in row.items() if value is not None})


def test_reads_the_authors_rows(tmp_path):
    several_answers = changed(reward_model={"ground_truth": ["4", "four"]}, ability=None)
    path = write_lines(tmp_path / "a.jsonl", json.dumps(AUTHORS_ROW), "", several_answers)
    messages = [{"role": "user", "content": "Let $n=9867$. ..."}]
    assert read_prompts(path) == [
        Prompt("math_longcot_math_verify", messages, "4", index=0),
        Prompt("math_longcot_math_verify", messages, ["4", "four"], index=1),
    ]


def test_parquet_and_jsonl_give_the_same(tmp_path):
    rows = [AUTHORS_ROW, {**AUTHORS_ROW, "data_source": "other"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows))
    assert read_prompts(tmp_path / "a.parquet") == read_prompts(tmp_path / "a.jsonl")


def test_reads_conversations(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"messages": CONVERSATION, "id": 7}))
    parsed = [conversation for _, conversation in parse_rows(path, parse_conversation)]
    assert parsed == [Conversation(CONVERSATION, index=0)]


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ('{"data_source": "a"', None, "Invalid JSON"),
        ("[1, 2]", None, "object"),
        ('"\\ud800"', None, "Invalid JSON"),
        (changed(data_source=None), "data_source", "required"),
        (changed(data_source=7), "data_source", "string"),
        (changed(prompt="1+1"), "prompt", "list"),
        (changed(prompt=[]), "prompt", "at least 1 item"),
        (changed(prompt=[{"role": "user"}]), "prompt.0.content", "required"),
        (changed(prompt=[{"role": "robot", "content": ""}]), "prompt.0.role", "'assistant'"),
        (changed(reward_model={}), "reward_model.ground_truth", "required"),
        (changed(reward_model={"ground_truth": 4}), "reward_model.ground_truth", "string"),
        (changed(reward_model={"ground_truth": ""}), "reward_model.ground_truth", "empty"),
        (changed(reward_model={"ground_truth": []}), "reward_model.ground_truth", "empty"),
        (changed(reward_model={"ground_truth": [4]}), "reward_model.ground_truth", "string"),
    ],
)
def test_malformed_row_is_refused_with_file_line_and_field(tmp_path, row, field, what):
    path = write_lines(tmp_path / "bad.jsonl", json.dumps(AUTHORS_ROW), "", row, changed())
    with pytest.raises(UserError) as refusal:
        read_prompts(path)
    problem, advice = str(refusal.value).splitlines()
    where = f"{path}, line 3" + (f", field {field}" if field else "")
    assert problem.startswith(f"{where}: ")
    assert what in problem.removeprefix(where)
    assert "line 1" not in problem.removeprefix(str(path))
    assert "remove the row" in advice


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(AUTHORS_ROW).encode() + b'\n{"data_source": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: Invalid JSON"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (CONVERSATION[:1], "at least 2 items"),
        (CONVERSATION[:1] * 2, "no assistant message"),
        (CONVERSATION[::-1], "first message"),
    ],
)
def test_conversation_without_a_turn_to_learn_is_refused(tmp_path, messages, what):
    path = write_lines(tmp_path / "bad.jsonl", json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=f"line 1, field messages: .*{what}"):
        list(parse_rows(path, parse_conversation))


def test_malformed_parquet_row_is_refused_with_its_number(tmp_path):
    rows = [AUTHORS_ROW, {**AUTHORS_ROW, "data_source": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2, field data_source: .*string"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.jsonl", None, "no such data file"),
        ("rows.csv", "a,b", r"\.jsonl or \.parquet"),
        ("empty.jsonl", "\n", "no rows"),
        ("junk.parquet", "junk", "not a Parquet file"),
    ],
)
def test_unreadable_file_is_refused(tmp_path, name, content, what):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: .*{what}"):
        read_prompts(tmp_path / name)


def test_folder_of_files_is_read_as_a_hub_data_set_is(tmp_path, monkeypatch):
    rows = [{**AUTHORS_ROW, "ability": str(i)} for i in range(3)]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "owner" / "name" / "train.parquet")
    write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows))
    monkeypatch.chdir(tmp_path)
    assert read_prompts(Path("owner/name")) == read_prompts(tmp_path / "a.jsonl")


def test_name_that_is_no_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nobody/nothing: no data set that can be read"):
        read_prompts(Path("nobody/nothing"))


def test_several_data_sets_are_read_one_after_another(tmp_path):
    one = write_lines(tmp_path / "a.jsonl", changed(), changed(data_source="b"))
    other = write_lines(tmp_path / "b.jsonl", changed(data_source="c"))
    prompts = read_prompts([one, other])
    assert [prompt.data_source for prompt in prompts] == [AUTHORS_ROW["data_source"], "b", "c"]
    assert [prompt.index for prompt in prompts] == [0, 1, 2]


def test_bad_rows_are_skipped_and_told_where_asked(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", changed(), "{", changed(prompt=[]), changed())
    problems = []
    assert [prompt.index for prompt in read_prompts(path, problems.append)] == [0, 3]
    first, second = map(str, problems)
    assert first.startswith(f"{path}, line 2: Invalid JSON")
    assert second.startswith(f"{path}, line 3, field prompt: ")
    other = write_lines(tmp_path / "c.jsonl", changed())
    both = read_prompts([path, other], problems.append)
    assert [prompt.index for prompt in both] == [0, 3, 4]
    with pytest.raises(UserError, match="all rows are malformed"):
        read_prompts(write_lines(tmp_path / "b.jsonl", "{"), problems.append)


LCB_ROW = {
    "question_title": "Sum",
    "question_content": "Print a + b.",
    "platform": "atcoder",
    "question_id": "abc_1",
    "contest_date": "2025-01-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "3 4", "output": "7", "testtype": "stdin"}]),
    "metadata": "{}",
}


def test_livecodebench_rows_are_read_and_graded(tmp_path):
    starter = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    path = write_lines(
        tmp_path / "a.jsonl", json.dumps(LCB_ROW), json.dumps({**LCB_ROW, "starter_code": starter})
    )
    from_stdin, from_starter = read_prompts(path)
    assert "Print a + b." in from_stdin.messages[0]["content"]
    assert "standard input" in from_stdin.messages[0]["content"]
    assert starter in from_starter.messages[0]["content"]
    program = "<think></think>\n```python\nprint(sum(map(int, input().split())))\n```"
    with RewardPool(RewardConfig(workers=1)) as pool:
        (reward,) = pool.grade([(from_stdin.data_source, program, from_stdin.ground_truth)])
    assert reward.correct
