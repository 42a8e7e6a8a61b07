"""Every test has an assertion that can fail: a scan of the syntax trees of all tests.

Listed are tests without any assertion, `assert a or b` (passes for many reasons), and `assert all(...)` or
`assert not any(...)` over something that may be empty, where nothing is compared.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
FAILING = {"fail", "raises", "warns", "deprecated_call"}  # of pytest
SIZES = {
    "range", "zip", "enumerate", "list", "tuple", "sorted", "reversed", "set", "map", "pairwise", "combinations",
    "items", "values", "splitlines",
}  # fmt: skip
"""What gives as much as it is given."""

NEVER_EMPTY = {"vars", "parameters", "named_parameters"}  # of a batch, and of a model

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(TESTS.rglob("*.py"))}


@cache
def functions() -> list[tuple[Path, Function]]:
    return [(file, node) for file, tree in trees().items() for node in ast.walk(tree) if isinstance(node, Function)]


def called(node: ast.AST) -> Iterator[str]:
    """The names of what is called inside of `node`, without what stands before a dot."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            name = part.func
            yield name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")


@cache
def visible(file: Path) -> frozenset[Path]:
    """The file, and those of the tests' helpers from which it imports."""
    modules = {one.stem: one for one in trees()}
    imported = [part for part in ast.walk(trees()[file]) if isinstance(part, ast.Import | ast.ImportFrom)]
    names = {part.module for part in imported if isinstance(part, ast.ImportFrom)}
    names |= {alias.name for part in imported for alias in part.names}
    return frozenset({file} | {modules[name] for name in names if name in modules})


@cache
def asserting() -> frozenset[tuple[Path, str]]:
    """The tests' functions that assert something, themselves or through one another."""
    found: set[tuple[Path, str]] = set()
    while True:
        more = {
            (file, function.name)
            for file, function in functions()
            if (file, function.name) not in found and asserts_something(file, function, found)
        }
        if not more:
            return frozenset(found)
        found |= more


def asserts_something(file: Path, function: Function, known: Set[tuple[Path, str]]) -> bool:
    for part in ast.walk(function):
        if isinstance(part, ast.Assert | ast.Raise):
            return True
        if isinstance(part, ast.keyword) and part.arg == "check" and ast.unparse(part.value) == "True":
            return True  # `subprocess.run(..., check=True)`
    return any(
        name in FAILING or name.startswith("assert_") or any((one, name) in known for one in visible(file))
        for name in called(function)
    )


def source_of(iterable: ast.expr) -> ast.expr:
    """What is iterated over, below `zip`, `sorted`, `x.items()` and the like: their first argument."""
    while isinstance(iterable, ast.Call) and any(name in SIZES for name in list(called(iterable))[:1]):
        if iterable.args:
            iterable = iterable.args[0]
        elif isinstance(iterable.func, ast.Attribute):
            iterable = iterable.func.value
        else:
            break
    return iterable


def may_be_empty(given: ast.expr, function: Function, others: list[ast.Assert]) -> bool:
    """Whether no literal, constant or comparison of the test says that there is something to iterate over."""
    iterable, filtered = given, False
    if isinstance(given, ast.GeneratorExp | ast.ListComp):
        iterable, filtered = given.generators[0].iter, bool(given.generators[0].ifs)
    iterable = source_of(iterable)
    if isinstance(iterable, ast.Call) and not filtered and next(called(iterable)) in NEVER_EMPTY:
        return False
    if any(isinstance(iterable, ast.Name) and iterable.id in ast.unparse(one) for one in function.decorator_list):
        return False  # a parameter of the test, written out above it
    if isinstance(iterable, ast.Tuple | ast.List | ast.Set | ast.Dict | ast.Constant):
        return False
    if isinstance(iterable, ast.Name) and iterable.id.isupper():
        return False
    name = ast.unparse(iterable)
    return not any(name in ast.unparse(other.test) for other in others)


def weaknesses(file: Path, function: Function) -> Iterator[str]:
    asserts = [part for part in ast.walk(function) if isinstance(part, ast.Assert)]
    if not asserts and not asserts_something(file, function, asserting()):
        yield "no assertion"
    for one in asserts:
        test, wrong = one.test, "all"
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
            yield f"`or` in line {one.lineno}"
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, wrong = test.operand, "any"
        others = [other for other in asserts if other is not one]
        calls = isinstance(test, ast.Call) and getattr(test.func, "id", "") == wrong and test.args
        if calls and may_be_empty(test.args[0], function, others):
            yield f"`{wrong}` over what may be empty in line {one.lineno}"


def weak() -> dict[str, list[str]]:
    tests = [(file, function) for file, function in functions() if function.name.startswith("test_")]
    assert len(tests) > 1000
    found = {f"{file.relative_to(TESTS)}::{test.name}": list(weaknesses(file, test)) for file, test in tests}
    return {name: wrong for name, wrong in found.items() if wrong}


def test_every_test_has_an_assertion_that_can_fail():
    assert weak() == {}


def test_the_scan_sees_what_it_lists():
    def listed(body: str) -> list[str]:
        [function] = ast.parse(f"def test_x(found, rows):\n    {body}").body
        return [wrong.partition(" in line")[0] for wrong in weaknesses(Path(__file__), function)]

    assert listed("run(found)") == ["no assertion"]
    assert listed("assert found or rows") == ["`or`"]
    assert listed("assert all(row for row in rows)") == ["`all` over what may be empty"]
    assert listed("assert not any(row in found for row in sorted(rows))") == ["`any` over what may be empty"]
    for sound in (
        "assert found == rows", "assert all(row for row in (1, 2))", "assert len(rows) == 3; assert all(rows)",
        "assert any(found)", "assert_close(found, rows)", "with pytest.raises(ValueError): run()",
    ):  # fmt: skip
        assert listed(sound) == []
