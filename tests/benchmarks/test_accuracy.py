"""The tables of planned and measured peaks in the docs."""

from __future__ import annotations

from benchmarks import accuracy  # noqa: E402
from benchmarks.planner import Case, Comparison  # noqa: E402


def case(model, planned, policy="short prompt"):
    return Case(model, policy, planned, lambda: (1.25e9, 0.0))


def test_the_docs_show_what_is_planned_today(capsys):
    assert accuracy.main(["--check"]) == 0, capsys.readouterr().out + "run: python -m benchmarks.accuracy"


def test_what_is_planned_otherwise_by_now_is_named():
    measured = [case(model, planned).compare() for model, planned in (("a", 1.2e9), ("b", 1.3e9))]
    text = f"{accuracy._SECTION}\n{accuracy.tables([measured, []])}\n{accuracy._END}"
    assert "| short prompt | 1.200 / 1.250, -4.0 % | 1.300 / 1.250, +4.0 % |" in text
    assert not list(accuracy.stale(text, [case("a", 1.2e9), case("b", 1.3e9)]))
    assert list(accuracy.stale(text, [case("a", 1.2e9), case("b", 1.4e9), case("c", 1e9)])) == [
        "b, short prompt: 1.400 GB planned, but the docs have 1.300",
        "c, short prompt: 1.000 GB planned, but the docs have nothing",
    ]
    assert list(accuracy.stale(text, [case("a", 1.2e9)])) == ["b, short prompt: this case does not exist any more"]


def test_what_a_case_may_be_off():
    cases = {(0.971, 0.0): True, (0.969, 0.0): False, (1.09, 0.0): True, (1.11, 0.0): False, (1.0, 0.11): False}
    for (planned, flops), holds in cases.items():
        assert Comparison("a", "p", planned, 1.0, flops).holds is holds
