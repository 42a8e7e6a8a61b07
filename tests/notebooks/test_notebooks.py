"""notebooks/: clean, short, and each runs top to bottom on pico-LLaMA."""

import os
import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
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
    assert f'"git+{address}"' in notebook.cells[1].source
    assert tagged(notebook, "install") == [1] and len(tagged(notebook, "parameters")) == 1
    source = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"bf16\s*=|bfloat16", source), "a T4 has none; dtypes follow the card"
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", source):
        assert (path.parent / target).exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
@pytest.mark.parametrize("where", ["colab", "clone", "top of a clone", "zip", "elsewhere", "installed"])
def test_the_first_cell(path, where, tmp_path, monkeypatch):
    """What it gives to pip in Colab, in a clone, beside a zip file, outside of all, and where the package is installed."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    if "clone" in where:
        (tmp_path / "tuna_peft").mkdir()
        (tmp_path / "tuna_peft" / "__init__.py").touch()
    if where == "zip":
        (folder / "tuna_peft.zip").touch()
    if where == "colab":
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    monkeypatch.chdir(tmp_path if where == "top of a clone" else folder)
    monkeypatch.setenv("PATH", "before")
    found = [object()] if where == "installed" else []
    monkeypatch.setattr("importlib.metadata.distributions", lambda *, name: found if name == "tuna-peft" else None)
    given, calls = {}, []
    shell = SimpleNamespace(run_line_magic=lambda name, line: calls.append(f"{name} {line}".format(**given)))
    given["get_ipython"] = lambda: shell
    exec(TransformerManager().transform_cell(read(path).cells[1].source), given)

    address = re.search(r'^Repository = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
    clone = tmp_path.as_uri()
    source = {"clone": clone, "top of a clone": clone, "zip": f"{folder.as_uri()}/tuna_peft.zip"}.get(where)
    install = f'pip install -q "tuna-peft @ {source or "git+" + address}"'
    expected = {"installed": [], "colab": [install, "pip uninstall -q -y torchao"]}.get(where, [install])
    assert [re.sub(r"\[\w+\]|  #.*", "", call) for call in calls] == expected
    assert os.environ["PATH"].split(os.pathsep) == [sysconfig.get_path("scripts"), "before"]


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
