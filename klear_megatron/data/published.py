"""Rows of public programming data sets, in the formats in which they are published.

Their tests stay as they are until a response is graded: `rewards` reads each format.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

_TASK = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests."
)
_FROM_STARTER_CODE = (
    "Complete the following code, and give the whole of it in one block:\n```python\n{}\n```"
)
_FROM_STDIN = (
    "The program reads the input from standard input and writes the answer to standard output. "
    "Give the whole of it in one block:\n```python\n# your code\n```"
)
NonEmptyText = Annotated[str, Field(min_length=1)]


class PublishedRow(BaseModel):
    """A problem, its starter code where there is some, and its tests."""

    data_source: ClassVar[str]
    tests: ClassVar[set[str]]
    """The fields that say how to grade a response."""
    starter_code: str | None = None

    @property
    @abstractmethod
    def question(self) -> str:
        """The problem's text."""

    @property
    def ground_truth(self) -> str:
        """The tests, as JSON."""
        return json.dumps(self.model_dump(include=self.tests, exclude_none=True))

    @property
    def messages(self) -> list[dict[str, str]]:
        how = _FROM_STARTER_CODE.format(self.starter_code) if self.starter_code else _FROM_STDIN
        return [{"role": "user", "content": f"{_TASK}\n\n{self.question}\n\n{how}"}]


class LiveCodeBenchRow(PublishedRow):
    """`livecodebench/code_generation_lite`, all versions."""

    data_source = "coder1_longcot_livecodebench"
    tests = {"public_test_cases", "private_test_cases", "metadata"}
    question_content: NonEmptyText
    public_test_cases: str = "[]"
    private_test_cases: str = "[]"
    metadata: str = "{}"

    @property
    def question(self) -> str:
        return self.question_content


class LeetCodeRow(PublishedRow):
    """`newfacade/LeetCodeDataset`."""

    data_source = "coder1_longcot_leetcode"
    tests = {"test", "entry_point"}
    problem_description: NonEmptyText
    entry_point: NonEmptyText
    test: NonEmptyText

    @property
    def question(self) -> str:
        return self.problem_description


class TacoRow(PublishedRow):
    """`BAAI/TACO` and `codeparrot/apps`."""

    data_source = "coder1_longcot_taco"
    tests = {"input_output"}
    text: NonEmptyText = Field(alias="question")
    input_output: Any

    @property
    def question(self) -> str:
        return self.text


class CodeforcesRow(PublishedRow):
    """`open-r1/codeforces`."""

    data_source = "coder1_longcot_codeforces"
    tests = {"official_tests", "interaction_format", "generated_checker", "input_mode"}
    description: NonEmptyText
    input_format: str | None = None
    output_format: str | None = None
    note: str | None = None
    examples: list[dict[str, str]] | None = None
    official_tests: list[dict[str, Any]]
    interaction_format: str | None = None
    generated_checker: str | None = None
    input_mode: str | None = None

    @property
    def question(self) -> str:
        parts = {"Input": self.input_format, "Output": self.output_format}
        for number, example in enumerate(self.examples or [], 1):
            parts[f"Example {number}, input"] = example.get("input")
            parts[f"Example {number}, output"] = example.get("output")
        parts["Note"] = self.note
        sections = [f"## {title}\n{text}" for title, text in parts.items() if text]
        return "\n\n".join([self.description, *sections])


_FORMATS: dict[str, type[PublishedRow]] = {
    "question_content": LiveCodeBenchRow,
    "problem_description": LeetCodeRow,
    "input_output": TacoRow,
    "official_tests": CodeforcesRow,
}


def published_format(row: Mapping[str, Any]) -> type[PublishedRow] | None:
    """The format of a row that is in none of ours; told by a field that only it has."""
    return next((form for field, form in _FORMATS.items() if field in row), None)
