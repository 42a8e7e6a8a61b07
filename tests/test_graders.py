"""Graders by name."""

import sys

import pytest

from tuna_peft.errors import UserError
from tuna_peft.graders import load_grader


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_grader.py").write_text("def short(record, response):\n    return len(response)\n")
    (tmp_path / "json.py").write_text("raise ValueError('hides the one of Python')\n")
    monkeypatch.chdir(tmp_path)
    # As the installed command starts: the current folder is not on the path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert load_grader("own_grader:short", "judge.function")({}, "abc") == 3
    monkeypatch.delitem(sys.modules, "own_grader")
    monkeypatch.delitem(sys.modules, "json")
    assert load_grader("json:loads", "judge.function")("[1]") == [1]


@pytest.mark.parametrize("name", ["nowhere_at_all:f", "json:nothing", "json:decoder", "", "json"])
def test_what_is_no_function_says_so(name):
    with pytest.raises(UserError, match="no grader"):
        load_grader(name, "judge.function")
