"""The ranking loss against numbers worked out by hand and a slow independent implementation; its invariants."""

import itertools
import math

import pytest
import torch

from tuna_peft import tuna_loss
from tuna_peft.training.loss import RankingLoss
from tuna_peft.training.ranks import PairCounts, dense_ranks


@pytest.fixture(autouse=True)
def float64():
    """Values and expectations that differ by more than a bound of 1e-6 or less differ by more than rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def slow_loss(lists, margin, reduction):
    """The loss of lists of (score, rank), one list per prompt, pair by pair in plain Python."""
    by_gap, total = {}, 0.0
    for responses in lists:
        order = sorted({rank for _, rank in responses})
        steps = [(score, order.index(rank)) for score, rank in responses]
        for (v_i, r_i), (v_j, r_j) in itertools.permutations(steps, 2):
            if r_i < r_j:
                hinge = max(0.0, v_j - v_i + margin * (r_j - r_i))
                by_gap.setdefault(r_j - r_i, []).append(hinge)
                total += hinge
    if reduction == "pair_sum":
        return total / len(lists)
    return sum(sum(gap) / len(gap) for gap in by_gap.values())


def reference_formula(scores, margin):
    """The released loss for equal N without ties: per gap, a mean over batch and position."""
    loss = 0.0
    for gap in range(1, scores.shape[1]):
        loss = loss + (scores[:, gap:] - scores[:, :-gap] + margin * gap).clamp_min(0).mean()
    return loss


def test_by_hand():
    # gap 1: max(0, -2+1+.1)=0, max(0, -1.5+2+.1)=.6 -> mean .3; gap 2: max(0, -1.5+1+.2)=0
    scores = torch.tensor([[-1.0, -2.0, -1.5]])
    assert tuna_loss(scores).item() == pytest.approx(0.3)
    assert tuna_loss(scores, reduction="pair_sum").item() == pytest.approx(0.6)
    # A tie of the last two leaves pairs (0,1) and (0,2), both one step apart: 0 and max(0, -1.5+1+.1)=0
    assert tuna_loss(scores, ranks=torch.tensor([[0, 1, 1]])).item() == 0.0
    assert tuna_loss(scores, ranks=torch.tensor([[0, 0, 1]]), margin=1.0).item() == pytest.approx((0.5 + 1.5) / 2)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_equals_the_released_formula_on_equal_n(n):
    scores = torch.randn(7, n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(tuna_loss(scores, margin=0.3), reference_formula(scores, 0.3))


@pytest.mark.parametrize("reduction", ["gap_mean", "pair_sum"])
def test_equals_slow_implementation_with_ties_and_missing(reduction):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(4, 5, generator=generator)
        ranks = torch.randint(0, 4, (4, 5), generator=generator)
        mask = torch.rand(4, 5, generator=generator) > 0.3
        lists = [[(scores[b, i].item(), ranks[b, i].item()) for i in range(5) if mask[b, i]] for b in range(4)]
        expected = slow_loss(lists, 0.1, reduction)
        actual = tuna_loss(scores, ranks=ranks, mask=mask, margin=0.1, reduction=reduction)
        assert actual.item() == pytest.approx(expected, abs=1e-12)


def test_missing_responses_change_nothing_and_get_no_gradient():
    scores = torch.tensor([[-1.0, -0.5, -3.0]])
    wide = torch.tensor([[-1.0, float("nan"), -0.5, -3.0]], requires_grad=True)
    loss = tuna_loss(wide, mask=torch.tensor([[True, False, True, True]]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), tuna_loss(scores))
    assert wide.grad[0, 1] == 0 and torch.isfinite(wide.grad).all()


def test_order_of_tied_responses_does_not_matter():
    scores = torch.tensor([[-1.0, -2.0, -0.3, -4.0]])
    ranks = torch.tensor([[0, 1, 1, 2]])
    swap = [0, 2, 1, 3]
    torch.testing.assert_close(tuna_loss(scores, ranks=ranks), tuna_loss(scores[:, swap], ranks=ranks))


def test_gradient_pushes_the_better_response_up():
    scores = torch.tensor([[-2.0, -1.0]], requires_grad=True)
    tuna_loss(scores).backward()
    assert scores.grad.tolist() == [[-1.0, 1.0]]


def test_no_pair_is_zero_with_a_gradient():
    for scores, ranks in [(torch.zeros(2, 1), None), (torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long))]:
        scores.requires_grad_()
        loss = tuna_loss(scores, ranks=ranks)
        loss.backward()
        assert loss.item() == 0.0 and scores.grad is not None


def plackett_luce(responses, beta):
    """Negative log-probability of the order under the Plackett-Luce model; tied responses do not compete."""
    total = 0.0
    for v, rank in responses:
        left = [other for other, below in responses if below > rank]
        total -= math.log(math.exp(beta * v) / sum(math.exp(beta * other) for other in [v, *left]))
    return total


@pytest.mark.parametrize("reduction", ["gap_mean", "pair_sum"])
def test_logistic_is_simpo_on_a_pair_and_its_sum_over_a_list(reduction):
    v, beta, gamma = torch.tensor([[-1.0, -0.7]]), 2.5, 0.5
    simpo = -torch.nn.functional.logsigmoid(beta * v[:, 0] - beta * v[:, 1] - gamma).mean()
    ours = tuna_loss(v, loss_type="logistic", beta=beta, margin=gamma / beta, reduction=reduction)
    torch.testing.assert_close(ours, simpo)
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    ranks, mask = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3], [1, 0, 5, 5]]), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    by_gap, total = {}, 0.0
    for b in range(3):
        there = [(scores[b, i].item(), ranks[b, i].item()) for i in range(4) if mask[b, i]]
        order = sorted({rank for _, rank in there})
        for (v_i, r_i), (v_j, r_j) in itertools.permutations(there, 2):
            gap = order.index(r_j) - order.index(r_i)
            if gap > 0:
                by_gap.setdefault(gap, []).append(math.log1p(math.exp(1.5 * (v_j - v_i + 0.2 * gap))))
                total += by_gap[gap][-1]
    expected = total / 3 if reduction == "pair_sum" else sum(sum(gap) / len(gap) for gap in by_gap.values())
    ours = tuna_loss(scores, ranks=ranks, mask=mask, margin=0.2, reduction=reduction, loss_type="logistic", beta=1.5)
    assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_list_mle_is_the_likelihood_of_the_order():
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    ranks, mask = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 2], [3, 1, 0, 0]]), torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    lists = [[(scores[b, i].item(), ranks[b, i].item()) for i in range(4) if mask[b, i]] for b in range(3)]
    expected = sum(plackett_luce(responses, 1.7) for responses in lists) / 3
    ours = tuna_loss(scores, ranks=ranks, mask=mask, loss_type="list_mle", beta=1.7)
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    # Over all orders of three responses the probabilities add up to one.
    v = torch.tensor([[-0.3, -1.0, 0.4]])
    orders = [torch.tensor([order]) for order in itertools.permutations(range(3))]
    losses = [tuna_loss(v, ranks=order, loss_type="list_mle", beta=1.0) for order in orders]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)


ALL_LOSSES = [
    RankingLoss("hinge", reduction="gap_mean"), RankingLoss("hinge", reduction="pair_sum"),
    RankingLoss("logistic", reduction="gap_mean"), RankingLoss("logistic", reduction="pair_sum"),
    RankingLoss("list_mle"),
]  # fmt: skip


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: f"{loss.loss_type}-{loss.reduction}")
def test_micro_batches_with_the_counts_of_all_add_up(loss):
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[0, 3] = mask[4, 2] = False
    ranks = dense_ranks(mask.long().cumsum(-1), mask)
    counts = PairCounts.of(ranks)
    # One prompt of three responses with another's: micro-batches may be narrower than the step.
    shares = [loss(scores[:1, :3], ranks[:1, :3], counts), loss(scores[1:2], ranks[1:2], counts)]
    shares += [loss(scores[i : i + 2], ranks[i : i + 2], counts) for i in (2, 4)]
    torch.testing.assert_close(sum(shares), loss(scores, ranks, counts))


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: f"{loss.loss_type}-{loss.reduction}")
def test_missing_or_tied_responses_have_no_effect_on_any_loss(loss):
    options = {"loss_type": loss.loss_type, "reduction": loss.reduction}
    wide = torch.tensor([[-1.0, float("nan"), -0.5, -3.0]], requires_grad=True)
    value = tuna_loss(wide, mask=torch.tensor([[True, False, True, True]]), **options)
    value.backward()
    torch.testing.assert_close(value.detach(), tuna_loss(torch.tensor([[-1.0, -0.5, -3.0]]), **options))
    assert wide.grad[0, 1] == 0 and torch.isfinite(wide.grad).all()
    tied = torch.randn(2, 3, requires_grad=True)
    value = tuna_loss(tied, ranks=torch.zeros(2, 3, dtype=torch.long), **options)
    value.backward()
    assert value.item() == 0 and not tied.grad.any()


def test_wrong_input():
    with pytest.raises(ValueError, match="share the shape"):
        tuna_loss(torch.zeros(2, 3), ranks=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        tuna_loss(torch.zeros(2, 3), reduction="mean")
    with pytest.raises(ValueError, match="unknown loss_type 'dpo'.*'list_mle'"):
        tuna_loss(torch.zeros(2, 3), loss_type="dpo")
