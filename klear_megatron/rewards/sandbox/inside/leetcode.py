"""The lists and trees of LeetCode's problems, which their data sets take for granted."""

from __future__ import annotations  # importing `typing` would take longer than a test

from collections import deque

from remote import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any


class _Node:
    fields: tuple[str, ...]

    def become(self, other: Any) -> None:
        """Takes over the fields of the program's copy of this node."""
        for field in self.fields:
            setattr(self, field, getattr(other, field))


class ListNode(_Node):
    fields = ("val", "next")

    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val = val
        self.next = next


class TreeNode(_Node):
    fields = ("val", "left", "right")

    def __init__(self, val: Any = 0, left: Any = None, right: Any = None) -> None:
        self.val = val
        self.left = left
        self.right = right


def list_node(values: Iterable[Any]) -> ListNode | None:
    """The list of these values; None for none."""
    head = None
    for value in reversed([*values]):
        head = ListNode(value, head)
    return head


def tree_node(values: Iterable[Any]) -> TreeNode | None:
    """The tree of these values, row by row; None where there is no node."""
    rest = iter(values)
    root_value = next(rest, None)
    if root_value is None:
        return None
    root = TreeNode(root_value)
    parents = deque([root])
    while parents:
        parent = parents.popleft()
        for side in ("left", "right"):
            value = next(rest, None)
            if value is not None:
                child = TreeNode(value)
                setattr(parent, side, child)
                parents.append(child)
    return root


def is_same_list(a: Any, b: Any) -> bool:
    while a is not None and b is not None:
        if a.val != b.val:
            return False
        a, b = a.next, b.next
    return a is None and b is None


def is_same_tree(a: Any, b: Any) -> bool:
    pairs = [(a, b)]
    while pairs:
        a, b = pairs.pop()
        if a is None or b is None:
            if a is not None or b is not None:
                return False
            continue
        if a.val != b.val:
            return False
        pairs += [(a.left, b.left), (a.right, b.right)]
    return True


NAMES = {
    name: f"leetcode.{name}"
    for name in ("ListNode", "TreeNode", "list_node", "tree_node", "is_same_list", "is_same_tree")
}


def encode_nodes(root: _Node, special: Callable[[Any], Any]) -> list[Any]:
    """All nodes that can be reached from this one, each as its class and fields, as JSON."""
    found = {id(root): 0}
    nodes: list[_Node] = [root]
    for node in nodes:
        for field in node.fields:
            child = getattr(node, field)
            if isinstance(child, _Node) and id(child) not in found:
                found[id(child)] = len(nodes)
                nodes.append(child)

    def encode_field(value: Any) -> Any:
        return {"node": found[id(value)]} if id(value) in found else encode(value, special)

    return [
        [type(node).__name__, [encode_field(getattr(node, field)) for field in node.fields]]
        for node in nodes
    ]


def build_nodes(
    nodes: list[Any], namespace: dict[str, Any], special: Callable[[str, Any], Any]
) -> Any:
    """The inverse of `encode_nodes`, made of the program's own classes where it has some."""
    kinds: dict[str, type[_Node]] = {"ListNode": ListNode, "TreeNode": TreeNode}
    built = [namespace.get(kind, kinds[kind])() for kind, _ in nodes]

    def decode_node(kind: str, content: Any) -> Any:
        return built[content] if kind == "node" else special(kind, content)

    for node, (kind, values) in zip(built, nodes, strict=True):
        for field, value in zip(kinds[kind].fields, values, strict=True):
            setattr(node, field, decode(value, decode_node))
    return built[0]
