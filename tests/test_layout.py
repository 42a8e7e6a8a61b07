"""The package's layout: imports point one way, files stay short, and starting up loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tuna_peft"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400
LONGER: dict[str, str] = {}  # file: why it may be longer

# A folder may import what stands in a later row, and nothing else. The last row is the modules at the top.
ROWS = [
    {"cli"},
    {"run"},
    {"planning"},
    {"recipe"},
    {"feedback", "training", "export", "evaluation"},
    {"models"},
    {"data"},
    {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"},
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}


def imported(code: str) -> set[str]:
    """The modules of the package that `code` imports, at its top or inside functions, such as `data.load`."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "the package imports by whole names"
            # `from tuna_peft.data import load` may name a module.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("tuna_peft.") for name in names if name.startswith("tuna_peft.")}


def offenders(importer: str, code: str) -> list[str]:
    """What a file of `importer`, a folder or module at the top of the package, must not import."""
    row = ROW_OF[importer]
    found = []
    for name in sorted(imported(code)):
        target = name.partition(".")[0]
        among_modules = row == ROW_OF.get(target) == len(ROWS) - 1  # `test_no_circle_between_folders` has these
        if target != importer and target in ROW_OF and ROW_OF[target] <= row and not among_modules:
            found.append(name)
    return found


def node_of(parts: tuple[str, ...]) -> str:
    """The folder that a module is in; modules at the top count as folders of their own."""
    while len(parts) > 1 and not PACKAGE.joinpath(*parts).is_dir():
        parts = parts[:-1]
    return "/".join(parts)


def test_every_folder_with_code_has_a_row():
    with_code = {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE}
    assert with_code - {"assets"} == set().union(*ROWS[:-1])  # assets holds data and a grader, imported by name


@pytest.mark.parametrize("folder", sorted(ROW_OF))
def test_imports_point_one_way(folder):
    wrong = {}
    for file in [PACKAGE / f"{folder}.py"] if ROW_OF[folder] == len(ROWS) - 1 else (PACKAGE / folder).rglob("*.py"):
        if found := offenders(folder, file.read_text(encoding="utf-8")):
            wrong[file.relative_to(PACKAGE).as_posix()] = found
    assert not wrong


def test_no_circle_between_folders():
    graph: dict[str, set[str]] = {}
    for file in FILES:
        importer = node_of(file.relative_to(PACKAGE).with_suffix("").parts)
        targets = {node_of(tuple(name.split("."))) for name in imported(file.read_text(encoding="utf-8"))}
        graph.setdefault(importer, set()).update(targets - {importer})
    assert len(graph) > 15
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which lists the circle


def test_what_would_be_noticed():
    assert offenders("data", "def f():\n    from tuna_peft.models.base import load\n") == ["models.base.load"]
    assert offenders("training", "import tuna_peft.feedback.judge") == ["feedback.judge"]
    assert offenders("errors", "from tuna_peft import data") == ["data"]
    assert offenders("recipe", "from tuna_peft.recipe import schema\nfrom tuna_peft.errors import UserError") == []
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_files_are_short():
    lines = {file.relative_to(PACKAGE).as_posix(): len(file.read_text("utf-8").splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES and name not in LONGER} == {}
    assert {name for name in LONGER if lines.get(name, 0) <= MOST_LINES} == set(), "these are short again"


def test_importing_the_package_and_its_modules_at_the_top_loads_no_torch():
    modules = ["tuna_peft", *(f"tuna_peft.{name}" for name in sorted(ROWS[-1]))]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers', 'trl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_schema_loads_only_pydantic():
    others = {"datasets", "huggingface_hub", "numpy", "peft", "rich", "torch", "transformers", "trl", "typer", "yaml"}
    code = f"import sys, tuna_peft.recipe.schema; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
