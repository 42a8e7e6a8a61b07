"""A slice of `make fuzz`, and that its classes tell failures apart."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_inputs import GENERATORS, Case


def test_fifty_inputs_end_clearly():
    classes, notes = fuzz.fuzz(50, seed=20260)
    failures = [note for note in notes if note[0] in fuzz.FAILURES]
    assert not failures, failures
    assert classes["clear"] >= 25
    assert classes.total() == 50


def test_a_table_of_60000_columns_ends_clearly(tmp_path):
    """Twice, settings were looked for in quadratic time; drawn by few seeds only."""
    table = tmp_path / "wide.csv"
    names = [f"c{number}" for number in range(60_000)]
    table.write_text(",".join(names) + "\n" + ",".join("x" for _ in names))
    found, said = fuzz.run_case(Case("wide", ["data", "inspect", str(table)]))
    assert (found, "no known format has the keys" in said) == ("clear", True)


def test_the_same_seed_makes_the_same_input(tmp_path):
    for generator in set(GENERATORS):
        cases, contents = [], []
        for folder in (tmp_path / f"{generator.__name__}{n}" for n in range(2)):
            folder.mkdir()
            cases.append(generator(random.Random(5), folder))
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            contents.append([(file.relative_to(folder), file.read_bytes()) for file in files])
        assert cases[0] == cases[1]
        if generator.__name__ not in (
            "adapter_tensors",
            "data_damage",
        ):  # written by libraries
            assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("raises", "expected"),
    [(RuntimeError("x"), "traceback"), (KeyError("x"), "traceback"), (None, "accepted though wrong")],
)
def test_failures_are_noticed(monkeypatch, raises, expected):
    def recipe_reference():
        if raises:
            raise raises
        return ""

    monkeypatch.setattr("tuna_peft.recipe.reference.recipe_reference", recipe_reference)
    assert fuzz.run_case(Case("x", ["schema", "--markdown"]))[0] == expected
    if not raises:
        assert fuzz.run_case(Case("x", ["schema", "--markdown"], "reason")) == ("accepted", "reason")


@pytest.mark.parametrize("limit", ["CPU_SECONDS", "SECONDS"])
def test_hangs_are_noticed(monkeypatch, limit):
    def recipe_reference():
        while True:
            time.sleep(0.01 if limit == "SECONDS" else 0)

    monkeypatch.setattr("tuna_peft.recipe.reference.recipe_reference", recipe_reference)
    monkeypatch.setattr(fuzz, limit, 0.3)
    assert fuzz.run_case(Case("x", ["schema", "--markdown"]))[0] == "hang"
