"""Using a program's functions and classes from another process, which the program cannot touch.

The program's process serves its names over a stream socket (`serving`); whoever tests it holds
proxies. Plain data crosses by value: numbers, text, bytes, None and the collections. Anything else
stays where it is and is a proxy on the other side: a `Remote` for an object of the program, a
function for a function of the tests.

So whatever is compared with plain data is made of real ints and lists, whatever the program has
done to its own. No `__eq__` or `__add__` of the program's is ever asked about data of the tests:
only about two objects that are both the program's. It never sees what its results are compared
with.

Messages are JSON, each behind its length in four bytes, most significant first. A request has a
"do", a reply a "value" or an "error".
"""

from __future__ import annotations  # importing `typing` would take longer than a test

import builtins
import json
from collections import Counter, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Any

MAX_MESSAGE_BYTES = 1 << 24


class Peer:
    """One end of a connection. Both ends may ask; while one waits, it answers the other."""

    def __init__(self, sock: socket) -> None:
        self._socket = sock

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises ConnectionError where the other side has gone or sends more than is allowed."""
        self.send(request)
        while "do" in (message := self.receive()):
            self.send(self.answer(message))
        return message

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def send(self, message: object) -> None:
        data = json.dumps(message).encode()
        self._socket.sendall(len(data).to_bytes(4, "big") + data)

    def receive(self) -> dict[str, Any]:
        length = int.from_bytes(self._read(4), "big")
        if length > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {length} bytes is too long")
        message = json.loads(self._read(length))
        if not isinstance(message, dict):
            raise ConnectionError("a message that is no object")
        return message

    def _read(self, size: int) -> bytes:
        chunks = []
        while size:
            chunk = self._socket.recv(min(size, 1 << 20))
            if not chunk:
                raise ConnectionError("the other side has gone")
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)


_COLLECTIONS = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque
}  # fmt: skip
_MAPPINGS = {"Counter": Counter, "dict": dict}
_SPECIAL_MODULES = ("program", __name__)


def encode(value: Any, special: Callable[[Any], Any]) -> Any:
    """Plain data as JSON that keeps its types; `special(x)` is what stands for an x that is none.

    What inherits from such a type is data of that type, unless its class is the program's.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value).__module__ in _SPECIAL_MODULES:
        return special(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    for name, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [encode(item, special) for item in value]}
    for name, kind in _MAPPINGS.items():
        if isinstance(value, kind):
            return {name: [[encode(item, special) for item in pair] for pair in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, slice):
        return {"slice": [encode(x, special) for x in (value.start, value.stop, value.step)]}
    if type(value).__module__ == "numpy":
        return encode(value.tolist(), special)
    return special(value)


def decode(data: Any, special: Callable[[str, Any], Any]) -> Any:
    """The inverse of `encode`; `special(kind, content)` is what {kind: content} stands for."""
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name in _COLLECTIONS:
        return _COLLECTIONS[name](decode(item, special) for item in content)
    if name in _MAPPINGS:
        pairs = {decode(key, special): decode(item, special) for key, item in content}
        return _MAPPINGS[name](pairs)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "slice":
        return slice(*(decode(x, special) for x in content))
    return special(name, content)


class Tests(Peer):
    """The side of the tests: makes proxies of what the program sends."""

    def __init__(self, sock: socket) -> None:
        super().__init__(sock)
        self._objects: dict[int, Any] = {}
        self._exceptions: dict[int, type[Exception]] = {}
        self._functions: list[Callable[..., Any]] = []

    def do(self, action: str, *operands: Any, **details: Any) -> Any:
        """What the program's side answers; exceptions are raised as they were there."""
        encoded = [encode(operand, self.stand_in) for operand in operands]
        reply = self.ask({"do": action, "with": encoded, **details})
        if "error" in reply:
            raise self._exception(reply["error"])
        if "operands" in reply:
            update(list(operands), decode(reply["operands"], self.proxy))
        return decode(reply["value"], self.proxy)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The program calls a function that the tests gave it."""
        try:
            function = self._functions[request["function"]]
            args, kwargs = decode(request["with"], self.proxy)
            return {"value": encode(function(*args, **kwargs), self.stand_in)}
        except Exception as error:
            return {"error": type(error).__name__}

    def stand_in(self, value: Any) -> Any:
        number = number_of(value)
        if number is not None:
            return {"object": number}
        if callable(value):
            self._functions.append(value)
            return {"function": len(self._functions) - 1}
        raise TypeError(f"{type(value).__name__} cannot be given to a program under test")

    def proxy(self, kind: str, content: Any) -> Any:
        if kind == "exception":
            return self._exception_class(content)
        if kind == "like":
            number, plain = content
            return _like(decode(plain, self.proxy), self, number)
        if kind != "object":
            raise ConnectionError(f"an unknown kind of value: {kind}")
        if content not in self._objects:
            self._objects[content] = Remote(self, content)
        return self._objects[content]

    def _exception(self, error: dict[str, Any]) -> Exception:
        kind = self._exception_class(error["classes"])
        exception = kind.__new__(kind, *decode(error["args"], self.proxy))
        exception.remote_number = error["object"]  # type: ignore[attr-defined]
        return exception

    def _exception_class(self, classes: list[list[Any]]) -> type[Exception]:
        """The class of the same name and of proxies of the same bases, which `except` can name.

        Args:
            classes: each class it inherits from, itself first: its name, and the number of its
                object, or None for one of Python's own.
        """
        kind: type[Exception] = Exception
        for name, number in reversed(classes):
            if number is None:
                builtin = getattr(builtins, name, None)
                # Never SystemExit: at the end of a test it would mean that all is well.
                if isinstance(builtin, type) and issubclass(builtin, Exception):
                    kind = builtin
            else:
                if number not in self._exceptions:
                    members = {"__getattr__": _attribute, "remote_tests": self}
                    self._exceptions[number] = type(name, (kind,), members)
                kind = self._exceptions[number]
        return kind


def _attribute(exception: Any, name: str) -> Any:
    if name == "remote_number":
        raise AttributeError(name)
    return exception.remote_tests.do("attribute", exception, name)


def number_of(value: Any) -> int | None:
    """The number of the program's object that this is a proxy of."""
    if isinstance(value, Remote):
        return value.remote_number
    return getattr(value, "remote_number", None) if isinstance(value, (_Like, Exception)) else None


class Remote:
    """An object of the program.

    Lists, sets and dicts among the arguments of a call are afterwards as the program left them.
    """

    remote_tests: Tests
    remote_number: int

    def __init__(self, tests: Tests, number: int) -> None:
        object.__setattr__(self, "remote_tests", tests)
        object.__setattr__(self, "remote_number", number)

    def __getattr__(self, name: str) -> Any:
        return self.remote_tests.do("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.remote_tests.do("set attribute", self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.remote_tests.do("call", self, args, kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        if number_of(instance) is None:
            return False
        return self.remote_tests.do("isinstance", instance, self) is True

    def __contains__(self, item: object) -> bool:
        try:
            return any(item == own for own in iter(self))
        except TypeError:  # it cannot be iterated over
            return self.remote_tests.do("contains", self, item) is True


def _forwarded(action: str) -> Callable[..., Any]:
    def method(self: Remote, *operands: Any) -> Any:
        return self.remote_tests.do(action, self, *operands)

    return method


def _among_remotes(action: str) -> Callable[[Remote, object], Any]:
    def method(self: Remote, other: object) -> Any:
        if not isinstance(other, Remote):
            return NotImplemented
        return self.remote_tests.do(action, self, other)

    return method


for _action in ("len", "iter", "next", "hash", "bool", "str", "repr", "getitem", "setitem"):
    setattr(Remote, f"__{_action}__", _forwarded(_action))
for _action in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "and", "or"):
    setattr(Remote, f"__{_action}__", _among_remotes(_action))


class _Like:
    """Plain data of a class of the program's, such as a named tuple: its attributes can be read."""

    remote_tests: Tests
    remote_number: int

    def __getattr__(self, name: str) -> Any:
        return self.remote_tests.do("attribute", self, name)


_LIKE = {kind: type(kind.__name__, (_Like, kind), {}) for kind in (int, float, str, tuple)}


def _like(plain: Any, tests: Tests, number: int) -> Any:
    like = _LIKE[type(plain)](plain)
    like.remote_tests, like.remote_number = tests, number
    return like


class Names(dict):  # type: ignore[type-arg]
    """A namespace whose missing names are the program's, and then those of `others`."""

    def __init__(self, tests: Tests, others: dict[str, object], **own: object) -> None:
        super().__init__(own, __builtins__=builtins, __name__="test")
        self._tests = tests
        self._others = others

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        try:
            return self._tests.do("name", name)
        except AttributeError:
            return self._others[name]


def update(mine: list[Any], theirs: list[Any]) -> None:
    """What the program has changed in its copies is changed in the tests' own."""
    for before, after in zip(mine, theirs, strict=True):
        if hasattr(before, "become") and isinstance(after, Remote):
            before.become(after)
        elif type(before) is not type(after):
            continue
        elif isinstance(before, tuple):
            update(list(before), list(after))
        elif isinstance(before, (list, deque)):
            before.clear()
            before.extend(after)
        elif isinstance(before, (dict, set)):
            before.clear()
            before.update(after)
