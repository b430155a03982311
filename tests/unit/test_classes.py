"""Classes with behaviour have few attributes. Values that mirror a file or a message are exempt: they declare them."""

import ast
from collections.abc import Iterator

import yaml

from tasks.settings import TREE
from tests.builders import recorded

PACKAGES = ("taxiway", "tasks", "broker", "router", "api", "workers", "local", "simulator", "controller")
MOST = 15
OVER = yaml.safe_load(recorded("attributes.yaml"))  # each may only shrink: none may be added


def attributes(found: ast.ClassDef) -> set[str]:
    """The names that the methods of a class assign to `self`."""
    return {
        node.attr
        for method in found.body
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def classes() -> Iterator[ast.ClassDef]:
    for package in PACKAGES:
        for path in sorted((TREE / package).rglob("*.py")):
            yield from (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ClassDef))


def test_a_class_with_behaviour_has_at_most_fifteen_attributes() -> None:
    counts = {one.name: len(attributes(one)) for one in classes()}
    assert {name: count for name, count in counts.items() if count > OVER.get(name, MOST)} == {}
