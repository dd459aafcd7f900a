"""The program's side of `remote`: its names, served until the tests hang up."""

from __future__ import annotations  # importing `typing` would take longer than a test

import _operator
import builtins
import os

import leetcode
from remote import Peer, decode, encode
from scripts import execute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from types import CodeType
    from typing import Any


def serve(code: CodeType, names: dict[str, object], sock: socket) -> None:
    program = Program(sock, execute(code, "program", names))
    while True:
        try:
            request = program.receive()
        except ConnectionError:
            os._exit(0)  # whatever threads the program has left
        program.send(program.answer(request))


_ACTIONS: dict[str, Callable[..., Any]] = {
    **{action: getattr(builtins, action) for action in ("len", "iter", "next", "hash", "bool")},
    **{action: getattr(builtins, action) for action in ("str", "repr", "isinstance")},
    **{action: getattr(_operator, action) for action in ("getitem", "setitem", "contains")},
    **{action: getattr(_operator, action) for action in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{action: getattr(_operator, action) for action in ("add", "sub", "mul", "truediv")},
    "and": _operator.and_,
    "or": _operator.or_,
    "attribute": getattr,
    "set attribute": setattr,
}


_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    tuple: lambda value: tuple(tuple.__iter__(value)),
}


class Program(Peer):  # type: ignore[misc]
    def __init__(self, sock: socket, namespace: dict[str, Any]) -> None:
        super().__init__(sock)
        self._namespace = namespace
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}  # by `id`, which lasts as long as its object

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            operands = [decode(operand, self._thing) for operand in request["with"]]
            return self._perform(request["do"], operands)
        except Exception as error:
            return {"error": self._error(error)}

    def _perform(self, action: str, operands: list[Any]) -> dict[str, Any]:
        if action == "name":
            if operands[0] not in self._namespace:
                raise AttributeError(operands[0])
            return {"value": encode(self._namespace[operands[0]], self._stand_in)}
        if action != "call":
            return {"value": encode(_ACTIONS[action](*operands), self._stand_in)}
        function, args, kwargs = operands
        value = function(*args, **kwargs)
        return {
            "value": encode(value, self._stand_in),
            "operands": encode(operands, self._stand_in),
        }

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": self._classes(value)}
        for kind, copy in _PLAIN.items():
            if isinstance(value, kind):
                # By the type's own methods, not by the program's.
                return {"like": [self._number(value), encode(copy(value), self._stand_in)]}
        return {"object": self._number(value)}

    def _number(self, value: object) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]

    def _error(self, error: Exception) -> dict[str, Any]:
        return {
            "classes": self._classes(type(error)),
            "args": encode(error.args, self._stand_in),
            "object": self._number(error),
        }

    def _classes(self, kind: type[Exception]) -> list[list[Any]]:
        return [
            [base.__name__, None if base.__module__ == "builtins" else self._number(base)]
            for base in kind.__mro__
        ]

    def _thing(self, kind: str, content: Any) -> Any:
        if kind == "object":
            return self._objects[content]
        if kind == "nodes":
            return leetcode.build_nodes(content, self._namespace, self._thing)
        return self._function(content)

    def _function(self, number: int) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            passed = encode([args, kwargs], self._stand_in)
            reply = self.ask({"do": "call", "function": number, "with": passed})
            if "error" in reply:
                kind = getattr(builtins, reply["error"], RuntimeError)
                raise kind("raised by a function of the tests")
            return decode(reply["value"], self._thing)

        return function
