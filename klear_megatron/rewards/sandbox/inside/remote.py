"""Calling a program's functions from another process, which the program cannot touch.

The program's process serves its names over a stream socket; whoever tests it holds proxies. Only
plain data crosses, by value: numbers, text, bytes, None, lists, tuples, sets and dicts. Anything
else stays in the program's process and is a `Remote` outside. So what is compared outside is made
of real ints and lists, whatever the program has done to its own: no `__eq__` of its making ever
runs there, and it never sees what its results are compared with.

Messages are JSON, each behind its length in four bytes, most significant first.
"""

from __future__ import annotations  # importing `typing` would take longer than a test

import builtins
import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

MAX_MESSAGE_BYTES = 1 << 24


class Connection:
    """Sends and receives messages."""

    def __init__(self, sock: socket) -> None:
        self._socket = sock

    def send(self, message: object) -> None:
        data = json.dumps(message).encode()
        self._socket.sendall(len(data).to_bytes(4) + data)

    def receive(self) -> Any:
        """Raises ConnectionError where the other side has gone or sends more than is allowed."""
        length = int.from_bytes(self._read(4))
        if length > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {length} bytes is too long")
        return json.loads(self._read(length))

    def _read(self, size: int) -> bytes:
        chunks = []
        while size:
            chunk = self._socket.recv(min(size, 1 << 20))
            if not chunk:
                raise ConnectionError("the other side has gone")
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)


def encode(value: Any, address: Callable[[object], int]) -> Any:
    """Plain data as JSON that keeps its types; `address(x)` numbers an object x that is none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(item, address) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(item, address) for item in pair] for pair in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if type(value).__name__ in ("ndarray", "deque"):
        return encode(list(value), address)
    if hasattr(type(value), "item"):  # a number of numpy's
        return encode(value.item(), address)
    return {"object": address(value)}


def decode(data: Any, find: Callable[[int], object]) -> Any:
    """The inverse of `encode`; `find(number)` is the object of a number."""
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "object":
        return find(content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[name](decode(item, find) for item in content)


class Names(dict):  # type: ignore[type-arg]
    """A namespace whose missing names are the program's."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(__builtins__=builtins, __name__="test")
        self._connection = connection

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        try:
            return _ask(self._connection, {"name": name})
        except AttributeError:
            raise KeyError(name) from None


class Remote:
    """An object of the program's process: it can be called, and its attributes read.

    Lists, sets and dicts among the arguments of a call are afterwards as the program left them.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return _ask(self._connection, {"attribute": name, "of": self._number})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def address(value: object) -> int:
            if isinstance(value, Remote):
                return value._number
            raise TypeError(f"{type(value).__name__} cannot be given to a program under test")

        passed = encode([args, kwargs], address)
        return _ask(self._connection, {"call": self._number, "with": passed}, (args, kwargs))


def _ask(connection: Connection, request: object, arguments: Any = ((), {})) -> Any:
    def find(number: int) -> Remote:
        return Remote(connection, number)

    connection.send(request)
    reply = connection.receive()
    if "error" in reply:
        kind = getattr(builtins, str(reply["error"]), None)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            kind = RuntimeError
        raise kind("raised by the program under test")
    if "arguments" in reply:
        args, kwargs = decode(reply["arguments"], find)
        _update([*arguments[0], *arguments[1].values()], [*args, *kwargs.values()])
    return decode(reply["value"], find)


def _update(mine: list[Any], theirs: list[Any]) -> None:
    for before, after in zip(mine, theirs, strict=True):
        if type(before) is not type(after):
            continue
        if isinstance(before, list):
            before[:] = after
        elif isinstance(before, (dict, set)):
            before.clear()
            before.update(after)


def check(code: CodeType, sock: socket) -> None:
    """Runs a test's own code; an exception of it ends this process with a status other than 0."""
    exec(code, Names(Connection(sock)))
