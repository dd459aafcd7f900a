"""Rows of the public LiveCodeBench files, in their original format."""

import json
from typing import Annotated

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


class LiveCodeBenchRow(BaseModel):
    """A problem; its tests stay packed until a response is graded."""

    question_content: Annotated[str, Field(min_length=1)]
    starter_code: str = ""
    public_test_cases: str = "[]"
    private_test_cases: str = "[]"
    metadata: str = "{}"

    @property
    def data_source(self) -> str:
        return "coder1_longcot_livecodebench"

    @property
    def messages(self) -> list[dict[str, str]]:
        how = _FROM_STARTER_CODE.format(self.starter_code) if self.starter_code else _FROM_STDIN
        return [{"role": "user", "content": f"{_TASK}\n\n{self.question_content}\n\n{how}"}]

    @property
    def ground_truth(self) -> str:
        names = {"public_test_cases", "private_test_cases", "metadata"}
        return json.dumps(self.model_dump(include=names))
