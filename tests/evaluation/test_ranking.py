"""The task `ranking`: metrics worked out by hand, and the whole task on a tiny model."""

import math

import pytest
import torch
from rounding import logps_bound
from tiny_llama import load_tiny, write_base

from tuna_peft.data.as_dataset import ranked_dataset
from tuna_peft.data.ranked import normalise
from tuna_peft.data.tokenize import encode_dataset
from tuna_peft.evaluation.ranking import evaluate_ranking
from tuna_peft.evaluation.ranking_metrics import kendall_tau_b, ndcg, pairs_of, reciprocal_rank, top1_hit
from tuna_peft.models.forward import scoring

RIGHT, WRONG = [-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]
RANKS = [0, 1, 2]


@pytest.mark.parametrize(
    ("v", "ranks", "tau"),
    [
        (RIGHT, RANKS, 1.0),
        (WRONG, RANKS, -1.0),
        ([-1, -3, -2], RANKS, 1 / 3),  # two pairs right, one wrong
        ([-1, -2, -3], [0, 0, 1], 2 / math.sqrt(3 * 2)),  # one pair tied in rank
        ([-1, -1, -2], RANKS, 2 / math.sqrt(2 * 3)),  # one pair tied in v
        ([-1, -1, -1], RANKS, None),
    ],
)
def test_kendall_tau_b(v, ranks, tau):
    assert kendall_tau_b(v, ranks) == (None if tau is None else pytest.approx(tau))


def test_ndcg():
    log = math.log2
    ideal = 2 + 1 / log(3)  # gains 2, 1, 0
    assert ndcg(RIGHT, RANKS) == pytest.approx(1)
    assert ndcg(WRONG, RANKS) == pytest.approx((1 / log(3) + 2 / log(4)) / ideal)
    assert ndcg([-1, -1, -1], RANKS) == pytest.approx((1 + 1 / log(3) + 1 / log(4)) / 3 * 3 / ideal)


def test_the_top():
    assert (top1_hit(RIGHT, RANKS), top1_hit(WRONG, RANKS)) == (1, 0)
    assert top1_hit([-1, -1, -3], RANKS) == 0.5
    assert top1_hit([-2, -1, -3], [0, 0, 1]) == 1  # two are best
    assert (reciprocal_rank(RIGHT, RANKS), reciprocal_rank(WRONG, RANKS)) == (1, 1 / 3)
    assert reciprocal_rank([-2, -1, -3], [0, 0, 1]) == 1
    assert reciprocal_rank([-1, -1, -1], RANKS) == 1 / 2


def test_pairs_leave_ties_out():
    pairs = pairs_of([-1.0, -2.0, -1.5], [0, 1, 1], [2, 4, 1])
    assert [(pair.v_gap, pair.rank_gap, pair.length_ratio) for pair in pairs] == [(1.0, 1, 0.5), (0.5, 1, 2.0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_tiny(write_base(tmp_path_factory.mktemp("base")), "none")


@pytest.fixture(scope="module")
def rows(base):
    records = [
        {"id": f"p{i}", "prompt": f"w{i + 3} w7 ", "completions": ["w9 w8 w7", f"w{i + 9}", "w5 w6"], "scores": scores}
        for i, scores in enumerate([[3, 2, 1], [1, 2, 2], [1, 3, 2], [2, 1, 3]])
    ]
    records.append({"id": "two", "prompt": "w4 w8 ", "completions": ["w5 w6", "w9"], "scores": [1, 0]})
    normal = [normalise(record, record["id"]).record for record in records]
    return encode_dataset(ranked_dataset(normal), base.tokenizer, max_length=None)[0]


def within(base, v):
    """Mean log-probabilities, up to rounding."""
    return pytest.approx(v, rel=0, abs=logps_bound(base.model))


def test_batches_do_not_matter_and_prompts_keep_their_order(base, rows):
    one, all_at_once = (evaluate_ranking(base.model, base.tokenizer, rows, batch_size=n) for n in (1, 8))
    assert [prompt.id for prompt in one.prompts] == ["p0", "p1", "p2", "p3", "two"]
    for mine, other in zip(one.prompts, all_at_once.prompts, strict=True):
        assert mine.details["v"] == within(base, other.details["v"])
        assert mine.details["ranks"] == other.details["ranks"]


def test_a_batch_that_runs_out_of_memory_goes_on_as_halves(base, rows, monkeypatch):
    expected = evaluate_ranking(base.model, base.tokenizer, rows)
    sizes, score = [], scoring.response_logps

    def small(model, batch):
        sizes.append(len(batch.ranks_BN))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return score(model, batch)

    monkeypatch.setattr(scoring, "response_logps", small)
    found = evaluate_ranking(base.model, base.tokenizer, rows)
    assert sizes == [5, 2, 3, 1, 2]
    for one, two in zip(expected.prompts, found.prompts, strict=True):
        assert one.id == two.id and two.details["v"] == within(base, one.details["v"])


def test_v_is_the_mean_log_probability_of_the_response(base, rows):
    result = evaluate_ranking(base.model, base.tokenizer, rows)
    for row, prompt in zip(rows, result.prompts, strict=True):
        scored = zip(row["completions_ids"], prompt.details["v"], prompt.details["lengths"], strict=True)
        for response, v, length in scored:
            ids = torch.tensor([row["prompt_ids"] + response])
            logps = base.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[-len(response) :]
            assert v == within(base, logps.mean().item()) and length == len(response)


def test_metrics_agree_with_the_prompts(base, rows):
    result = evaluate_ranking(base.model, base.tokenizer, rows)
    leads = [pair.v_gap for prompt in result.prompts for pair in pairs_of(*prompt.details.values())]
    accuracy = result.metrics["pair_accuracy"]
    assert accuracy.count == len(leads) == 3 + 2 + 3 + 3 + 1
    assert accuracy.value == pytest.approx(sum(lead > 0 for lead in leads) / len(leads))
    assert accuracy.low <= accuracy.value <= accuracy.high
    weighted = sum(prompt.scores["pair_accuracy"] * prompt.weight for prompt in result.prompts)
    assert weighted / sum(prompt.weight for prompt in result.prompts) == pytest.approx(accuracy.value)
    by_length = [group["pair_accuracy"].count for group in result.groups.values()]
    assert sum(by_length) == accuracy.count
    assert result.prompts[0].response in ("w9 w8 w7", "w9", "w5 w6")
    assert result.prompts[0].references == ["w9 w8 w7"] and result.prompts[0].prompt.strip() == "w3 w7"
    assert result.metrics["margin_satisfaction"].value <= accuracy.value


def test_a_response_without_a_finite_probability_is_left_out_by_name(base, rows, monkeypatch):
    import tuna_peft.evaluation.ranking as module

    real = module._scored

    def broken(*args):
        for number, (row, v, lengths) in enumerate(real(*args)):
            yield row, [math.nan, *v[1:]] if number == 2 else v, lengths

    monkeypatch.setattr(module, "_scored", broken)
    result = evaluate_ranking(base.model, base.tokenizer, rows)
    assert [prompt.id for prompt in result.prompts] == ["p0", "p1", "p3", "two"]
    [left_out] = result.excluded
    assert (left_out.count, left_out.names) == (1, ["p2"]) and "finite" in left_out.reason
