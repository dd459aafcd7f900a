"""The program's side of `remote`: its names, served until the tests hang up."""

from __future__ import annotations  # importing `typing` would take longer than a test

import os

from remote import Connection, decode, encode
from scripts import execute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from types import CodeType
    from typing import Any


def serve(code: CodeType, names: dict[str, object], sock: socket) -> None:
    connection = Connection(sock)
    namespace = execute(code, "program", names)
    objects: list[object] = []

    def address(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    while True:
        try:
            request = connection.receive()
        except ConnectionError:
            os._exit(0)  # whatever threads the program has left
        try:
            reply = _answer(request, namespace, objects, address)
        except Exception as error:
            reply = {"error": type(error).__name__}
        connection.send(reply)


def _answer(
    request: dict[str, Any], namespace: dict[str, object], objects: list[Any], address: Any
) -> dict[str, object]:
    if "name" in request:
        if request["name"] not in namespace:
            return {"error": "AttributeError"}
        return {"value": encode(namespace[request["name"]], address)}
    if "attribute" in request:
        target = objects[request["of"]]
        return {"value": encode(getattr(target, request["attribute"]), address)}
    args, kwargs = decode(request["with"], objects.__getitem__)
    value = objects[request["call"]](*args, **kwargs)
    return {
        "value": encode(value, address),
        "arguments": encode([args, kwargs], address),
    }
