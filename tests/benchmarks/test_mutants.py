"""The list of planted bugs fits the code, and the runner tells what is noticed."""

from __future__ import annotations

import ast

import pytest

from benchmarks.mutants import ROOT, Mutant, failing_test, planted, read_mutants, run_tests

MUTANTS = read_mutants()
FOLDERS = {"cli", "data", "evaluation", "export", "feedback", "models", "planning", "recipe", "run", "training"}


def test_there_are_a_hundred_over_all_folders():
    assert len(MUTANTS) >= 100 and len({(mutant.file, mutant.old) for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.file.partition("/")[0] for mutant in MUTANTS} >= FOLDERS


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_fits_the_code(mutant):
    """Where the code has changed, the mutant is to be changed too, or replaced by another."""
    source = (ROOT / "tuna_peft" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    changed = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert mutant.tests
    for name in mutant.tests:
        file, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """A repository of one module and its tests."""
    (tmp_path / "tuna_peft").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tuna_peft" / "__init__.py").touch()
    (tmp_path / "tuna_peft" / "double.py").write_text("def double(x):\n    return 2 * x\n")
    test = "from tuna_peft.double import double\n\ndef test_it():\n    assert double({}) == {}\n"
    (tmp_path / "tests" / "test_zero.py").write_text(test.format(0, 0))
    (tmp_path / "tests" / "test_three.py").write_text(test.format(3, 6))
    (tmp_path / "tests" / "test_sleep.py").write_text("import time\n\ndef test_it():\n    time.sleep(60)\n")
    (tmp_path / "tests" / "test_broken.py").write_text("import tuna_peft.absent\n")
    return tmp_path


def test_what_tests_notice(copy):
    mutant = Mutant("double.py", "2 * x", "3 * x", ("test_zero.py",))
    assert run_tests(copy, ["test_three.py"]) == ("passed", "")
    with planted(mutant, copy):
        assert run_tests(copy, ["test_zero.py"]) == ("passed", "")
        outcome, by = run_tests(copy, ["test_zero.py", "test_three.py"])
        assert outcome == "failed" and by.startswith("FAILED tests/test_three.py::test_it")
    assert run_tests(copy, ["test_three.py"]) == ("passed", "")
    assert run_tests(copy, ["test_broken.py"])[0] == "failed"
    assert run_tests(copy, ["test_sleep.py"], seconds=1)[0] == "hang"
    with pytest.raises(RuntimeError, match="pytest ended with 4"):
        run_tests(copy, ["test_absent.py"])
    with pytest.raises(ValueError, match="occurs 0 times"), planted(Mutant("double.py", "4 * x", "x", ()), copy):
        pass


def test_a_result_holds_until_the_code_or_a_test_changes(copy, monkeypatch):
    monkeypatch.setattr("benchmarks.mutants.ROOT", copy)
    mutant = Mutant("double.py", "2 * x", "3 * x", ("test_three.py::test_it",))
    keys = [mutant.key(), mutant.key()]
    for file in ("tests/test_three.py", "tuna_peft/double.py"):
        with open(copy / file, "a") as changed:
            changed.write("\n")
        keys.append(mutant.key())
    assert len(set(keys)) == 3 and keys[0] == keys[1]


def test_the_test_of_a_failure_may_have_spaces_in_its_id():
    assert (
        failing_test("FAILED tests/a/test_b.py::test_c[122-the disk] - AssertionError: x")
        == "a/test_b.py::test_c[122-the disk]"
    )
    assert failing_test("ERROR tests/test_b.py") == "test_b.py"
