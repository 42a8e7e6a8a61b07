"""Costs and their limit, by hand on small numbers."""

from __future__ import annotations

import pytest

from tuna_peft.feedback.settings import ServerSettings
from tuna_peft.feedback.spending import CostLimitReached, Estimate, Spending, Usage, estimate_tokens


def spending(**limits):
    """One token in costs 1, one token out 10."""
    return Spending(ServerSettings(base_url="http://x/v1", model="m", price_in=1e6, price_out=1e7, **limits))


def test_the_limit_counts_what_is_under_way_and_may_be_reached_exactly():
    money = spending(max_cost=100)
    with money.request(Usage(1, 10, 5)) as used:  # 60 at most
        with pytest.raises(CostLimitReached, match="another answer could cost 41"), money.request(Usage(1, 1, 4)):
            pass
        with money.request(Usage(1, 0, 4)) as other:  # 100 in all
            other.append(Usage(1, 0, 1))
        used.append(Usage(1, 10, 2))
    assert money.usage == Usage(2, 10, 3) and money.cost == 40
    with money.request(Usage(1, 0, 6)):  # what was not used is free again
        pass
    assert money.cost == 40  # a request without an answer costs nothing
    with pytest.raises(CostLimitReached, match="40.0000 of at most 100 is spent"), money.request(Usage(1, 1, 6)):
        pass


def test_estimates_add_up():
    assert spending().estimate(3, [(5, 2), (1, 1)]) == Estimate(3, 2, 6, 3, 36.0)
    assert Spending().estimate(3, [(5, 2)]) == Estimate(3, 1, 5, 2, None)
    assert Spending().cost == 0.0


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("abcd", 1), ("abcde", 2), ("äöü", 3), ("abcdä", 2)])
def test_tokens_are_estimated_from_characters(text, tokens):
    assert estimate_tokens(text) == tokens
