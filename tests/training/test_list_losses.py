"""Losses over whole lists, and on scores, against their papers' formulas in plain Python."""

import itertools
import math

import pytest
import torch

from tuna_peft import tuna_loss
from tuna_peft.training.loss import RankingLoss
from tuna_peft.training.ranks import PairCounts, dense_ranks

BETA = 1.7


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def mpo(v, ranks, scores):
    better = [math.exp(BETA * v[i]) for i in range(len(v)) if ranks[i] < sum(ranks) / len(ranks)]
    return -math.log(sum(better) / sum(math.exp(BETA * each) for each in v)) if better else 0.0


def info_nca(v, ranks, scores):
    shares = softmax([BETA * each for each in v])
    return -sum(target * math.log(share) for target, share in zip(softmax(scores), shares, strict=True))


def nca(v, ranks, scores):
    return -sum(
        target * math.log(sigmoid(BETA * each)) + math.log(sigmoid(-BETA * each)) / len(v)
        for target, each in zip(softmax(scores), v, strict=True)
    )


def qrpo(v, ranks, scores):
    log_z = math.log(BETA * (math.exp(1 / BETA) - 1))
    quantiles = [sum(other >= rank for other in ranks) / len(ranks) for rank in ranks]
    errors = [quantile - BETA * log_z - BETA * each for quantile, each in zip(quantiles, v, strict=True)]
    return sum(error**2 for error in errors) / len(errors)


@pytest.fixture
def lists():
    """Values, scores with ties, and which responses there are; the same as plain lists."""
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    scores = torch.randint(0, 4, (6, 5), generator=generator).double()
    mask = torch.rand(6, 5, generator=generator) > 0.3
    mask[:, :2] = True
    scores[0] = 1.0  # all tied
    plain = []
    for b in range(6):
        there = [k for k in range(5) if mask[b, k]]
        given = [scores[b, k].item() for k in there]
        order = sorted(set(given), reverse=True)
        plain.append(([v[b, k].item() for k in there], [order.index(score) for score in given], given))
    return v, scores, mask, plain


@pytest.mark.parametrize("formula", [mpo, info_nca, nca, qrpo])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_equals_the_formula_with_ties_and_missing(lists, formula, scale):
    v, scores, mask, plain = lists
    expected = sum(formula(v, ranks, [s / scale for s in given]) for v, ranks, given in plain) / len(plain)
    options = {"loss_type": formula.__name__, "beta": BETA, "score_scale": scale}
    actual = tuna_loss(v, ranks=-scores.long(), mask=mask, grades=scores, **options)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_margins_by_score_and_lambda_weights_are_those_of_the_formulas(lists):
    v, scores, mask, plain = lists
    for pair_weight, margin_by, scale in itertools.product(("equal", "lambda"), ("rank", "score"), (1.0, 2.0)):
        total = 0.0
        for values, ranks, given in plain:
            places = [1 + sum(other > value for other in values) for value in values]
            for i, j in itertools.permutations(range(len(values)), 2):
                if ranks[i] < ranks[j]:
                    unit = ranks[j] - ranks[i] if margin_by == "rank" else (given[i] - given[j]) / scale
                    weight = 1.0
                    if pair_weight == "lambda":
                        discounts = [1 / math.log(1 + places[k]) for k in (i, j)]
                        weight = abs(2 ** (given[i] / scale) - 2 ** (given[j] / scale)) * abs(
                            discounts[0] - discounts[1]
                        )
                    total += weight * math.log1p(math.exp(BETA * (values[j] - values[i] + 0.3 * unit)))
        actual = tuna_loss(
            v, ranks=-scores.long(), mask=mask, grades=scores, loss_type="logistic", reduction="pair_sum", beta=BETA,
            margin=0.3, margin_by=margin_by, pair_weight=pair_weight, score_scale=scale,
        )  # fmt: skip
        assert actual.item() == pytest.approx(total / len(plain), rel=1e-12)


def test_with_two_responses_they_are_what_their_papers_say():
    v, scores = torch.tensor([[0.4, -0.3]], dtype=torch.float64), torch.tensor([[900.0, -900.0]], dtype=torch.float64)
    dpo = math.log1p(math.exp(-BETA * 0.7))
    # MPO and InfoNCA become DPO, InfoNCA where the scores leave no doubt.
    for loss_type in ("mpo", "info_nca"):
        assert tuna_loss(v, grades=scores, loss_type=loss_type, beta=BETA).item() == pytest.approx(dpo)
    # TRL's `nca_pair`: -log s(c) - (log s(-c) + log s(-r)) / 2.
    pair = -math.log(sigmoid(BETA * 0.4)) - (math.log(sigmoid(-BETA * 0.4)) + math.log(sigmoid(BETA * 0.3))) / 2
    assert tuna_loss(v, grades=scores, loss_type="nca", beta=BETA).item() == pytest.approx(pair)


def test_qrpo_is_zero_at_its_optimum_also_where_the_exponential_overflows():
    for beta in (1e-3, 0.1, 2.0):
        log_z = math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))
        optimum = torch.tensor([[quantile / beta - log_z for quantile in (1.0, 2 / 3, 1 / 3)]], dtype=torch.float64)
        assert tuna_loss(optimum, loss_type="qrpo", beta=beta).item() == pytest.approx(0, abs=1e-18)


@pytest.mark.parametrize("loss_type", ["mpo", "info_nca", "nca", "qrpo"])
def test_missing_responses_change_nothing_and_micro_batches_add_up(lists, loss_type):
    v, scores, mask, _ = lists
    loss = RankingLoss(loss_type, beta=BETA)
    ranks = dense_ranks(-scores.long(), mask)
    counts = PairCounts.of(ranks)
    wild = v.masked_fill(~mask, float("nan")).requires_grad_()
    whole = loss(wild, ranks, counts, scores.masked_fill(~mask, 7.0))
    whole.backward()
    assert torch.isfinite(wild.grad).all() and not wild.grad[~mask].any() and wild.grad[mask].any()
    parts = [loss(v[rows], ranks[rows], counts, scores[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), whole.detach())


def test_a_list_of_ties_asks_nothing_of_mpo_and_a_prompt_without_responses_of_no_loss():
    tied = torch.randn(1, 3, requires_grad=True)
    tuna_loss(tied, ranks=torch.zeros(1, 3, dtype=torch.long), loss_type="mpo").backward()
    assert not tied.grad.any()
    for loss_type in ("mpo", "info_nca", "nca", "qrpo"):
        empty = torch.zeros(1, 3, requires_grad=True)
        value = tuna_loss(empty, mask=torch.zeros(1, 3, dtype=torch.bool), loss_type=loss_type)
        value.backward()
        assert torch.isfinite(value) and not empty.grad.any()
