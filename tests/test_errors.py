"""How errors word themselves."""

from __future__ import annotations

import pytest

from tuna_peft.errors import UserError, did_you_mean, first_line, listed


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, ..."), (9, "0, 1, 2, ...")]
)
def test_a_list_says_when_it_is_cut(count, expected):
    assert listed(map(str, range(count)), most=3) == expected


def test_the_parts_of_an_error():
    assert str(UserError("what")) == "what"
    assert str(UserError("what", where="here", fix="Do it.")) == "here: what\n  Do it."


def test_the_first_line_is_never_empty_or_long():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 400), most=300) == "x" * 300


def test_a_near_name_or_all_of_them():
    assert did_you_mean("margn", ["margin", "beta"]) == "Did you mean `margin`?"
    assert did_you_mean("colour", ["margin", "beta"]) == "Valid here: margin, beta."
