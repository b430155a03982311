"""How many small faults of the product its unit tests find: `python -m tests.mutants router/decide workers/decide`.

A mutant is a function with one operator, number, condition or returned value changed, and is found if a test that calls
it fails. Tests are collected and traced once; each mutant then has a fork in which its code stands in the function's
place, so that it costs what its tests take.
"""

import argparse
import ast
import gc
import os
import random
import signal
import sys
from collections import defaultdict
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tasks.settings import TREE

SECONDS, LEAST = 60, 0.75  # a mutant whose tests take longer is found; the share of mutants that must be
SWAPS: dict[type[ast.AST], Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changed(node: ast.AST) -> ast.AST | None:
    """The node with a fault, if it is of a kind that gets one."""
    match node:
        case ast.Compare(left, [op], right) if type(op) in SWAPS:
            return ast.Compare(left, [SWAPS[type(op)]()], right)
        case ast.BoolOp(op, values):
            return ast.BoolOp(SWAPS[type(op)](), values)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            return ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.Constant(bool() | int() | float() as value):
            return ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.Name(name, context) if name in NAMES:
            return ast.Name(NAMES[name], context)
        case ast.If(test, body, otherwise) if not isinstance(test, ast.Compare):
            return ast.If(ast.UnaryOp(ast.Not(), test), body, otherwise)
        case ast.Return(ast.expr()):
            return ast.Return(ast.Constant(None))
    return None


class Mutant(ast.NodeTransformer):
    """A module with a fault at the place with that number, of `places` in its functions and methods."""

    def __init__(self, path: Path, number: int = -1) -> None:
        self.path, self.number, self.places, self.text, self.function = str(path), number, 0, "", ""
        self._scope: list[str] = []
        self.tree = self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit(self, node: ast.AST) -> Any:
        outer = self._scope
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._scope = [*outer, node.name + "." * isinstance(node, ast.ClassDef)]
        self.generic_visit(node)
        fault = changed(node) if self._scope and not self._scope[-1].endswith(".") else None
        self.places += fault is not None
        if fault and self.places - 1 == self.number:
            self.function = "".join(self._scope[: 1 + self._scope[0].endswith(".")])
            line, before, after = getattr(node, "lineno", 0), ast.unparse(node), ast.unparse(fault)
            self.text = f"{Path(self.path).relative_to(TREE)}:{line}: {before[:60]} → {after[:60]}".replace("\n", " ")
            node = ast.copy_location(fault, node)
        self._scope = outer
        return node

    def install(self) -> None:
        """Put the function with the fault in place of the product's."""
        module = compile(ast.fix_missing_locations(self.tree), self.path, "exec", dont_inherit=True)
        (code,) = (one for one in _codes(module) if one.co_qualname == self.function)
        gc.unfreeze()  # what tests/conftest.py froze is not among the objects
        for one in gc.get_objects():
            if isinstance(one, FunctionType) and _name(one.__code__) == (self.path, self.function):
                one.__code__ = code


def _codes(code: CodeType) -> list[CodeType]:
    below = [one for one in code.co_consts if isinstance(one, CodeType)]
    return below + [inner for one in below for inner in _codes(one)]


def _name(code: CodeType) -> tuple[str, str]:
    return code.co_filename, code.co_qualname


class Trials:
    """A pytest plugin: which tests call what, then the tests of each mutant in a fork."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants, self.survivors, self._forked = mutants, list[str](), False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._forked:
            os._exit(1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        callers = defaultdict[tuple[str, str], list[pytest.Item]](list)
        for item, after in zip(session.items, [*session.items[1:], None], strict=True):
            called = set[tuple[str, str]]()
            sys.setprofile(lambda frame, *_, called=called: called.add(_name(frame.f_code)))
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            sys.setprofile(None)
            for one in called:
                callers[one].append(item)
        passed = [] if session.testsfailed else self.mutants
        self.survivors = [one.text for one in passed if self._survives(one, callers[one.path, one.function])]
        return True

    def _survives(self, mutant: Mutant, items: list[pytest.Item]) -> bool:
        if child := os.fork():
            return os.waitpid(child, 0)[1] == 0
        self._forked = True
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        mutant.install()
        for item, after in zip(items, [*items[1:], None], strict=False):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
        os._exit(0)


def main() -> int:
    """Print the survivors and each package's share of mutants that were found; 1 where one is below `LEAST`."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("packages", nargs="+", help="folders of the product")
    parser.add_argument("--sample", type=int, default=10**9, help="at most so many mutants of each, by chance")
    given, shares = parser.parse_args(), list[float]()
    for package in given.packages:
        paths = sorted((TREE / package).rglob("*.py"))
        places = [(path, number) for path in paths for number in range(Mutant(path).places)]
        trials = Trials([Mutant(*one) for one in random.Random(1).sample(places, min(given.sample, len(places)))])
        options = ["-p", "no:cacheprovider", "-q", "--hypothesis-profile=mutants"]
        if pytest.main([*options, f"tests/unit/{package.partition('/')[0]}"], plugins=[trials]):
            return 2
        shares.append(1 - len(trials.survivors) / len(trials.mutants))
        share = f"{package}: {shares[-1]:.0%} of {len(trials.mutants)} mutants found\n"
        sys.stdout.write("\n".join(["", *sorted(trials.survivors), share]))
    return int(min(shares) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
