import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from klear_megatron.data import Conversation, Prompt, read_prompts
from klear_megatron.data.config import PromptColumns
from klear_megatron.data.rows import parse_conversation, parse_prompt, parse_rows
from klear_megatron.errors import UserError
from klear_megatron.rewards import Job, RewardConfig, RewardPool, check_ground_truths

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
        (changed(prompt=7), "prompt", "list"),
        (changed(prompt=[]), "prompt", "at least 1 item"),
        (changed(prompt=[{"role": "user"}]), "prompt.0.content", "required"),
        (changed(prompt=[{"role": "robot", "content": ""}]), "prompt.0.role", "'assistant'"),
        (changed(reward_model={}), "reward_model.ground_truth", "required"),
        (changed(reward_model={"ground_truth": True}), "reward_model.ground_truth", "a text"),
        (changed(reward_model={"ground_truth": ""}), "reward_model.ground_truth", "empty"),
        (changed(reward_model={"ground_truth": []}), "reward_model.ground_truth", "empty"),
        (changed(reward_model={"ground_truth": [{}]}), "reward_model.ground_truth", "a text"),
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
    with pytest.raises(
        UserError, match=r"a\.parquet, row 2, field data_source: Field required; the row has "
    ):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.jsonl", None, "no such data file"),
        ("rows.tsv", "a,b", r"this kind of file is not known; give a \.jsonl"),
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
    with pytest.raises(
        UserError, match=r"nobody/nothing: no such folder here, and the .*hub cannot"
    ):
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


def test_messages_may_be_a_text_of_json():
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert parse_conversation({"messages": json.dumps(messages)}, 0).messages == messages
    with pytest.raises(UserError, match="a list of messages, or a text of JSON, but is no such"):
        parse_conversation({"messages": "1+1?"}, 0)


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
        (reward,) = pool.grade([Job(from_stdin.data_source, program, from_stdin.ground_truth)])
    assert reward.correct


ADD_METHOD = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b"
ADD_LINE = "print(sum(map(int, input().split())))"
PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "LeetCodeDataset": (
        {
            "task_id": "add-two",
            "question_id": 1,
            "difficulty": "Easy",
            "tags": ["Math"],
            "problem_description": "Add two numbers.",
            "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
            "prompt": "import math\n",
            "entry_point": "Solution().add",
            "test": "def check(candidate):\n    assert candidate(a = 2,b = 3) == 5\n",
            "input_output": [{"input": "a = 2, b = 3", "output": "5"}],
            "query": "You are an expert Python programmer.",
            "response": "",
        },
        ADD_METHOD,
    ),
    "TACO": (
        {
            "question": "Add two numbers.",
            "starter_code": "",
            "input_output": '{"inputs": ["2 3\\n"], "outputs": ["5\\n"]}',
            "difficulty": "EASY",
            "solutions": "[]",
        },
        ADD_LINE,
    ),
    "APPS": (
        {
            "problem_id": 7,
            "question": "Add two numbers.",
            "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
            "input_output": '{"fn_name": "add", "inputs": [[2, 3]], "outputs": [5]}',
        },
        ADD_METHOD,
    ),
    "Codeforces": (
        {
            "id": "1/A",
            "contest_start": 1400000000,
            "description": "Add two numbers.",
            "input_format": "One line.",
            "output_format": "Their sum.",
            "note": None,
            "examples": [{"input": "2 3", "output": "5"}],
            "official_tests": [{"input": "2 3\n", "output": "5\n"}],
            "interaction_format": None,
            "generated_checker": None,
            "input_mode": "stdio",
        },
        ADD_LINE,
    ),
    "LiveCodeBench": (LCB_ROW | {"question_content": "Add two numbers."}, ADD_LINE),
}


def test_rows_are_read_as_they_are_published_and_graded(tmp_path):
    lines = [json.dumps(row) for row, _ in PUBLISHED.values()]
    prompts = read_prompts(write_lines(tmp_path / "a.jsonl", *lines))
    check_ground_truths((prompt.data_source, prompt.ground_truth) for prompt in prompts)
    jobs = []
    for prompt, (row, program) in zip(prompts, PUBLISHED.values(), strict=True):
        (message,) = prompt.messages
        assert "Add two numbers." in message["content"]
        assert (row.get("starter_code") or "standard input") in message["content"]
        for code in (program, program.replace("+", "-").replace("sum", "max")):
            response = f"<think></think>\n```python\n{code}\n```"
            jobs.append(Job(prompt.data_source, response, prompt.ground_truth))
    assert "## Output\nTheir sum." in prompts[3].messages[0]["content"]
    assert "## Example 1, input\n2 3" in prompts[3].messages[0]["content"]
    with RewardPool(RewardConfig(workers=1)) as pool:
        rewards = pool.grade(jobs)
    assert [reward.correct for reward in rewards] == [True, False] * len(PUBLISHED)


def test_published_rows_that_cannot_be_graded_are_refused_and_counted(tmp_path):
    row, _ = PUBLISHED["Codeforces"]
    rows = [row, {**row, "interaction_format": "Ask."}, {**row, "generated_checker": "checker"}]
    path = write_lines(
        tmp_path / "a.jsonl", *map(json.dumps, [*rows, {**row, "official_tests": 1}])
    )
    problems: list[UserError] = []
    prompts = read_prompts(path, problems.append)
    (problem,) = problems
    assert "a.jsonl, line 4, field official_tests" in str(problem)
    with pytest.raises(UserError, match="interactive problem") as refused:
        check_ground_truths((prompt.data_source, prompt.ground_truth) for prompt in prompts)
    assert "rows that cannot be graded: 2\nrow 1: " in str(refused.value)


def test_messages_are_read_in_all_their_forms(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    messages = [{"role": "developer", "content": parts, "name": None}, call]
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"messages": messages, "tools": "[{}]"}))
    ((_, conversation),) = parse_rows(path, parse_conversation)
    assert conversation.messages == [
        {"role": "developer", "content": "1+1?"},
        {**call, "content": ""},
    ]
    assert conversation.tools == [{}]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chat": CONVERSATION}, r"messages: Field required; the row has chat; .*messages_key"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\.0\.content: Field required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\.0\.content: Every part should be of type text",
        ),
        (
            {"messages": [CONVERSATION[0], {**CONVERSATION[1], "weight": 0}]},
            "messages: There is no assistant message to train on",
        ),
    ],
)
def test_malformed_conversation_is_refused_with_what_to_set(tmp_path, row, what):
    path = write_lines(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(UserError, match=f"line 1, field {what}"):
        list(parse_rows(path, parse_conversation))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prompt": None}, r"prompt: Field required; the row has data_source, .*set prompt_key"),
        ({"reward_model": None}, "reward_model.ground_truth: .*; .*set ground_truth_key"),
        ({"tools": [{}]}, "tools: a prompt is answered in one turn"),
    ],
)
def test_prompt_without_a_column_is_refused_with_what_to_set(tmp_path, changes, what):
    with pytest.raises(UserError, match=f"line 1, field {what}"):
        read_prompts(write_lines(tmp_path / "a.jsonl", changed(**changes)))


def test_ground_truths_may_be_numbers_and_are_found_by_a_pattern():
    row = {"prompt": "1+1?", "answer": [0.5, 2], "data_source": "math"}
    prompt = parse_prompt(row, 0, PromptColumns(ground_truth_key="answer"))
    assert prompt == Prompt("math", [{"role": "user", "content": "1+1?"}], ["0.5", "2"], 0)
    columns = PromptColumns(ground_truth_key="answer", ground_truth_pattern="#### (.+)")
    with pytest.raises(UserError, match=r"answer: ground_truth_pattern .* is not found in '2'"):
        parse_prompt({**row, "answer": "2"}, 0, columns)


def test_row_of_a_table_with_too_few_fields_is_refused_with_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\n1,2\n3\n")
    with pytest.raises(UserError, match=r"a\.csv, line 3: The row has another number of fields"):
        list(parse_rows(tmp_path / "a.csv", lambda row, index: row))


def test_mistyped_folder_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/trian: cannot be read: no such folder"):
        read_prompts(Path("data/trian"))
