"""The tests of a programming problem, in the formats they come in."""

import base64
import binascii
import io
import json
import pickle
import random
import zlib
from collections.abc import Sequence
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
    """Python code that raises nothing where the names of the program that it uses are right."""

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
    * `[{"input": ..., "output": ..., "testtype": ...}, ...]`: the same test by test; with a
      testtype "functional", the function is named in `metadata.func_name`.
    * `{"public_test_cases": ..., "private_test_cases": ..., "metadata": ...}`: LiveCodeBench's,
      each a list of the kind before as JSON, private ones perhaps compressed.
    * `{"functional": code}`, `{"functional": [code, ...]}`, or a list of assertions.

    Raises:
        UserError: it is of no such form, or has no tests.
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
    if "functional" in parsed:
        return [CheckTest(code) for code in _strings(parsed["functional"])]
    if "private_test_cases" in parsed or "public_test_cases" in parsed:
        metadata = parsed.get("metadata") or {}
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        cases = [
            case
            for name in ("public_test_cases", "private_test_cases")
            for case in _unpack(parsed.get(name) or [])
        ]
        return _test_cases(cases, metadata.get("func_name"))
    inputs, outputs = parsed["inputs"], parsed["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
    pairs = list(zip(inputs, outputs, strict=True))
    if parsed.get("fn_name"):
        return [_call(parsed["fn_name"], *pair) for pair in pairs]
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


def _strings(value: Any) -> list[str]:
    """A text alone, or a list of texts."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError("functional: neither a text nor a list of texts")
    return strings


def _text(lines: str | list[Any]) -> str:
    return lines if isinstance(lines, str) else "\n".join(str(line) for line in lines)


def _call(function: str, arguments: Any, result: Any) -> CallTest:
    if isinstance(arguments, str):  # LiveCodeBench's: JSON throughout
        values = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        return CallTest(function, values, (_json_or_text(result),))
    # The older data sets wrap a result in a list, or do not.
    wrapped = isinstance(result, list) and len(result) == 1
    return CallTest(function, arguments, (result, result[0]) if wrapped else (result,))


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
    """Loads plain data only. Anything else, a class or a function, could run code of the file's."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to load {module}.{name} from a data file")
