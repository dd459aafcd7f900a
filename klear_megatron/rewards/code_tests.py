"""The tests of a programming problem, in all formats that data sets use."""

import base64
import binascii
import io
import json
import pickle
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from klear_megatron.errors import UserError

_MAX_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True)
class ScriptTest:
    """The program reads `stdin` and has to print `expected`."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class CallTest:
    """`function(*arguments)` has to return one of `accepted`."""

    function: str
    arguments: list[Any]
    accepted: tuple[Any, ...]


@dataclass(frozen=True)
class CheckTest:
    """Python code that uses the program's names, and raises nothing if the program is right."""

    code: str


Test = ScriptTest | CallTest | CheckTest


def sample_tests(tests: list[Test], most: int | None, seed: int) -> list[Test]:
    """At most `most` of the tests, in their order; the same ones for equal tests and seed."""
    if most is None or len(tests) <= most:
        return tests
    chosen = random.Random(f"{seed} {tests}").sample(range(len(tests)), most)
    return [tests[i] for i in sorted(chosen)]


def parse_tests(ground_truth: str | Sequence[str]) -> list[Test]:
    """The tests of a ground truth, all of one kind.

    It is a list of assertions, or a JSON text of one of these forms:

    * `{"inputs": [...], "outputs": [...]}`: standard input and output, each a text or a list of
      lines; with `"fn_name"`, arguments (a list, or a text with one JSON value a line) and results.
    * `[{"input": ..., "output": ..., "testtype": ...}, ...]`: the same test by test. If testtype
      is "functional", `metadata.func_name` names the function.
    * `{"public_test_cases": ..., "private_test_cases": ..., "metadata": ...}`: LiveCodeBench's.
      Both are JSON of the previous form; the private ones may be compressed.
    * `{"functional": code}`, `{"functional": [code, ...]}`, or a list of assertions.
    * `{"test": code, "entry_point": expression}`: LeetCodeDataset's and HumanEval's; the code
      defines `check(candidate)`.
    * `{"input_output": ...}`: TACO's and APPS's, an object of the first form, or its JSON.
    * `{"official_tests": [...], ...}`: Codeforces's, if comparing the output is enough.

    In these and LiveCodeBench's, other keys do not matter: all of a published row may be given.

    Raises:
        UserError: it has none of these forms, or no tests.
    """
    try:
        parsed = json.loads(ground_truth) if isinstance(ground_truth, str) else list(ground_truth)
        tests = _tests(parsed)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"reward_model.ground_truth: not the tests of a programming problem "
            f"({type(error).__name__}: {error}); docs/rewards.md has the formats"
        ) from error
    if not tests:
        raise UserError("reward_model.ground_truth: there are no tests in it")
    return tests


def _tests(parsed: Any) -> list[Test]:
    if isinstance(parsed, list):
        if all(isinstance(test, str) for test in parsed):
            return [CheckTest(code) for code in parsed]
        return _test_cases(parsed, function=None)
    if not isinstance(parsed, dict):
        raise ValueError("neither a list nor an object")
    for key, read in _FORMS.items():
        if key in parsed:
            return read(parsed)
    return _inputs_and_outputs(parsed)


def _functional(row: dict[str, Any]) -> list[Test]:
    codes = row["functional"]
    codes = [codes] if isinstance(codes, str) else codes
    if not isinstance(codes, list) or not all(isinstance(code, str) for code in codes):
        raise ValueError("functional: neither a text nor a list of texts")
    return [CheckTest(code) for code in codes]


def _livecodebench(row: dict[str, Any]) -> list[Test]:
    metadata = row.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    cases = [
        case
        for name in ("public_test_cases", "private_test_cases")
        for case in _unpack(row.get(name) or [])
    ]
    return _test_cases(cases, metadata.get("func_name"))


def _leetcode(row: dict[str, Any]) -> list[Test]:
    return [CheckTest(f"{row['test']}\n\ncheck({row['entry_point']})")]


def _taco(row: dict[str, Any]) -> list[Test]:
    tests = row["input_output"]
    return _inputs_and_outputs(json.loads(tests) if isinstance(tests, str) else tests)


def _codeforces(row: dict[str, Any]) -> list[Test]:
    if row.get("interaction_format"):
        raise ValueError("an interactive problem, which a list of tests cannot grade")
    if row.get("generated_checker"):
        raise ValueError("several outputs are right, and generated_checker is not supported")
    if row.get("input_mode", "stdio") != "stdio":
        raise ValueError("the program has to read a file, but there is only standard input")
    return _test_cases(row["official_tests"], function=None)


_FORMS: dict[str, Callable[[dict[str, Any]], list[Test]]] = {
    "functional": _functional,
    "public_test_cases": _livecodebench,
    "private_test_cases": _livecodebench,
    "entry_point": _leetcode,
    "input_output": _taco,
    "official_tests": _codeforces,
}
"""How to read an object that has this key."""


def _inputs_and_outputs(tests: dict[str, Any]) -> list[Test]:
    inputs, outputs = tests["inputs"], tests["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
    pairs = list(zip(inputs, outputs, strict=True))
    if tests.get("fn_name"):
        return [_call(tests["fn_name"], *pair) for pair in pairs]
    return [ScriptTest(_text(stdin), _text(expected)) for stdin, expected in pairs]


def _test_cases(cases: list[dict[str, Any]], function: str | None) -> list[Test]:
    types = {case.get("testtype") == "functional" for case in cases}
    if types == {True}:
        return [
            _call(function or case["metadata"]["func_name"], case["input"], case["output"])
            for case in cases
        ]
    if len(types) > 1:
        raise ValueError("some tests call a function, others do not")
    return [ScriptTest(_text(case["input"]), _text(case["output"])) for case in cases]


def _text(lines: str | list[Any]) -> str:
    return lines if isinstance(lines, str) else "\n".join(str(line) for line in lines)


def _call(function: str, arguments: Any, result: Any) -> CallTest:
    if isinstance(arguments, str):  # LiveCodeBench's: JSON throughout
        values = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        return CallTest(function, values, (_json_or_text(result),))
    # In older data sets a result may be wrapped in a list, and keys that are texts of whole numbers
    # stand for the numbers.
    arguments, result = [_whole_keys(argument) for argument in arguments], _whole_keys(result)
    wrapped = isinstance(result, list) and len(result) == 1
    return CallTest(function, arguments, (result, _whole_keys(result[0])) if wrapped else (result,))


def _whole_keys(value: Any) -> Any:
    """The same value, but numbers as keys of a dict whose keys are all texts of numbers."""
    try:
        return {int(key): x for key, x in value.items()} if isinstance(value, dict) else value
    except ValueError:
        return value


def _json_or_text(result: Any) -> Any:
    try:
        return json.loads(result) if isinstance(result, str) else result
    except ValueError:
        return result


def _unpack(cases: Any) -> Any:
    """LiveCodeBench's test cases: a list, its JSON, or base64 of zlib of a pickle of its JSON."""
    if not isinstance(cases, str):
        return cases
    try:
        return json.loads(cases)
    except ValueError:
        pass
    try:
        unzip = zlib.decompressobj()
        pickled = unzip.decompress(base64.b64decode(cases, validate=True), _MAX_UNPACKED_BYTES)
        if not unzip.eof:
            raise ValueError(f"compressed tests of more than {_MAX_UNPACKED_BYTES} bytes")
        text = _TextUnpickler(io.BytesIO(pickled)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError) as error:
        raise ValueError(f"private_test_cases: {error}") from error
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"private_test_cases: a pickled {type(text).__name__}, not a text")
    return json.loads(text)


class _TextUnpickler(pickle.Unpickler):
    """Loads plain data only: a class or a function could run code from the file."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to load {module}.{name} from a data file")
