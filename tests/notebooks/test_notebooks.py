"""notebooks/: clean, short, and each runs top to bottom on pico-LLaMA."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCREEN = 35
_LISTS = {"path": "builtin:pico-llama/teacher.json", "limit": 24}
# What stands in for real models, and fewer steps.
PARAMETERS = {
    "1_tuna_in_ten_minutes": {"STEPS": 3, "HELD_OUT": 8},
    "2_two_stages_in_4_bits": {
        "MODEL": "builtin:pico-llama", "TEMPLATE": "alpaca", "TEACHER": "builtin:pico-llama", "TRAIN": _LISTS,
        "HELD_OUT": _LISTS, "STEPS": 2, "MAX_LENGTH": 256,
    },
    "3_your_own_data": {"EPOCHS": 1, "MAX_NEW_TOKENS": 8},
    "4_merge_and_serve": {"STEPS": 2},
}  # fmt: skip
FAST = "1_tuna_in_ten_minutes"


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag):
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", ())]


def names(path):
    return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_it_is_clean_and_short(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02}" for i in range(len(notebook.cells))]
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= SCREEN, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"{cell.id}: strip the outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_it_opens_in_colab_and_installs_first(path):
    notebook = read(path)
    [address] = re.findall(r'^Repository = "(https://github.com/.*)"$', PYPROJECT, re.MULTILINE)
    colab = address.replace("https://", "https://colab.research.google.com/").replace("github.com", "github")
    assert f"]({colab}/blob/main/notebooks/{path.name})" in notebook.cells[0].source
    assert re.search(rf'%pip install -q "tuna-peft(\[\w+\])? @ git\+{address}"$', notebook.cells[1].source)
    assert tagged(notebook, "install") == [1] and len(tagged(notebook, "parameters")) == 1
    source = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"bf16\s*=|bfloat16", source), "a T4 has none; dtypes follow the card"
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", source):
        assert (path.parent / target).exists()


def test_each_has_parameters_of_its_own():
    assert [path.stem for path in NOTEBOOKS] == list(PARAMETERS)


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path.stem == FAST else pytest.mark.slow) for path in NOTEBOOKS], ids=names
)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(path)
    [given], [install] = tagged(notebook, "parameters"), tagged(notebook, "install")
    known = set(re.findall(r"^(\w+) =", notebook.cells[given].source, re.MULTILINE))
    assert set(PARAMETERS[path.stem]) <= known
    injected = "\n".join(f"{name} = {value!r}" for name, value in PARAMETERS[path.stem].items())
    notebook.cells.insert(given + 1, nbformat.v4.new_code_cell(injected))
    del notebook.cells[install]
    # A shell command that fails is an error, as a line of Python is.
    strict = "_system = get_ipython().system\ndef _checked(command):\n    _system(command)\n"
    strict += "    assert not get_ipython().user_ns.get('_exit_code'), command\nget_ipython().system = _checked\n"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(strict))
    patience = {"timeout": 1800, "startup_timeout": 1800}  # seconds, for busy machines
    NotebookClient(notebook, **patience, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "Traceback" not in text
