"""Every pair of values of two options of the loss, in a step whose loss is computed in plain Python beside it."""

import itertools
import math
import random

import pytest
import torch
from families import make_rows
from rounding import operations_of, rounding
from tiny_trainer import stacked, trainer

from tuna_peft.training.combinations import conflict

ROWS = 6
OPTIONS = {
    "loss_type": ["hinge", "logistic", "list_mle", "mpo", "info_nca", "nca", "qrpo"],
    "reference": ["none", "below"],
    "reduction": ["gap_mean", "pair_sum"],
    "margin": [0.0, 0.4],
    "margin_by": ["rank", "score"],
    "pair_weight": ["equal", "lambda"],
    "score_scale": [1.0, 3.0],
    "beta": [0.3, 1.5],
    "length_penalty": [0.0, 1.0],
    "mle_weight": [0.0, 0.7],
    "mle_on": ["all", "best", "reference"],
    "max_tokens_per_batch": [None, 40],
    "activation_memory": ["none", "full"],
    "gradient_accumulation_steps": [1, 3],
}


class Settings:
    """An object with these options, for `conflict`."""

    def __init__(self, options):
        self.__dict__.update(options)


def possible(options):
    return conflict(Settings(options)) is None


def pairs_of(options):
    return set(itertools.combinations(sorted(options.items(), key=str), 2))


def covering():
    """Settings in which every pair of values that can be combined occurs, the same every time."""
    draw = random.Random(0)
    drawn = ({name: draw.choice(values) for name, values in OPTIONS.items()} for _ in range(4000))
    candidates = [options for options in drawn if possible(options)]
    missing, chosen = set().union(*map(pairs_of, candidates)), []
    while missing:
        chosen.append(max(candidates, key=lambda options: len(missing & pairs_of(options))))
        missing -= pairs_of(chosen[-1])
    return chosen


CHOSEN = covering()


def test_the_pairs_are_all_but_those_that_exclude_each_other():
    covered = set().union(*map(pairs_of, CHOSEN))
    never = [
        pair
        for first, second in itertools.combinations(OPTIONS, 2)
        for pair in itertools.product([(first, v) for v in OPTIONS[first]], [(second, v) for v in OPTIONS[second]])
        if tuple(sorted(pair, key=str)) not in covered
    ]
    assert {frozenset(pair) for pair in never} == {
        frozenset({("loss_type", loss), other})
        for loss in ("list_mle", "mpo", "info_nca", "nca", "qrpo")
        for other in [("margin_by", "score"), ("pair_weight", "lambda")]
    } | {frozenset({("loss_type", loss), ("reference", "none")}) for loss in ("nca", "qrpo")}


# The loss in plain Python, from log-probabilities of separate sequences


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def of_a_list(options, v, ranks, scores):
    beta, n = options["beta"], len(v)
    weights = [math.exp(beta * value) for value in v]
    if options["loss_type"] == "list_mle":
        return -sum(
            math.log(weights[i] / (weights[i] + sum(weights[j] for j in range(n) if ranks[j] > ranks[i])))
            for i in range(n)
        )
    if options["loss_type"] == "mpo":
        better = [weights[i] for i in range(n) if ranks[i] < sum(ranks) / n]
        return -math.log(sum(better) / sum(weights)) if better else 0.0
    if options["loss_type"] == "info_nca":
        return -sum(target * math.log(weights[i] / sum(weights)) for i, target in enumerate(softmax(scores)))
    if options["loss_type"] == "nca":
        return -sum(
            target * math.log(sigmoid(beta * v[i])) + math.log(sigmoid(-beta * v[i])) / n
            for i, target in enumerate(softmax(scores))
        )
    log_z = math.log(beta * (math.exp(1 / beta) - 1))
    quantiles = [sum(other >= rank for other in ranks) / n for rank in ranks]
    return sum((quantile - beta * log_z - beta * value) ** 2 for quantile, value in zip(quantiles, v, strict=True)) / n


def of_pairs(options, v, ranks, scores):
    """`(difference in rank, loss)` of each pair."""
    places = [1 + sum(other > value for other in v) for value in v]
    for i, j in itertools.permutations(range(len(v)), 2):
        if ranks[i] < ranks[j]:
            unit = ranks[j] - ranks[i] if options["margin_by"] == "rank" else scores[i] - scores[j]
            x = v[j] - v[i] + options["margin"] * unit
            loss = max(0.0, x) if options["loss_type"] == "hinge" else math.log1p(math.exp(options["beta"] * x))
            if options["pair_weight"] == "lambda":
                discounts = [1 / math.log(1 + places[k]) for k in (i, j)]
                loss *= abs(2 ** scores[i] - 2 ** scores[j]) * abs(discounts[0] - discounts[1])
            yield ranks[j] - ranks[i], loss


def expected_loss(options, rows, whole, below):
    """The loss of one step over all rows; `whole` and `below` as `logps` returns them."""
    lists, pairs, nll, tokens = 0.0, [], 0.0, 0
    for row, sums, reference in zip(rows, whole, below, strict=True):
        lengths = [len(ids) - skip for ids, skip in zip(row["completions_ids"], row["completion_skips"], strict=True)]
        v = [
            (own - (other if options["reference"] == "below" else 0.0)) / length ** options["length_penalty"]
            for own, other, length in zip(sums, reference, lengths, strict=False)
        ]
        scores = [score / options["score_scale"] for score in row["scores"]]
        if options["loss_type"] in ("hinge", "logistic"):
            pairs += of_pairs(options, v, row["ranks"], scores)
        else:
            lists += of_a_list(options, v, row["ranks"], scores)
        responses = list(zip(sums[:-1], lengths, strict=True))
        imitated = {
            "all": responses,
            "best": [one for one, rank in zip(responses, row["ranks"], strict=True) if rank == 0],
            "reference": [(sums[-1], len(row["reference_ids"]))],
        }[options["mle_on"]]
        nll -= sum(own for own, _ in imitated)
        tokens += sum(length for _, length in imitated)
    gaps = {gap for gap, _ in pairs}
    if options["reduction"] == "gap_mean":
        by_gap = [[loss for other, loss in pairs if other == gap] for gap in gaps]
        ranking = sum(sum(losses) / len(losses) for losses in by_gap)
    else:
        ranking = sum(loss for _, loss in pairs) / len(rows)
    return ranking + lists / len(rows) + options["mle_weight"] * nll / tokens


def logps(model, row):
    """Summed log-probabilities of the row's responses and, last, of its reference, each as a separate sequence."""
    responses = [*zip(row["completions_ids"], row["completion_skips"], strict=True), (row["reference_ids"], 0)]
    sums = []
    for response, skip in responses:
        ids = torch.tensor([row["prompt_ids"] + response])
        each = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(response) :]
        sums.append(each[skip:].sum().item())
    return sums


@pytest.fixture(scope="module")
def measured(base_folder):
    """The rows, and their log-probabilities by the whole stack and by the stack below, neither near the base's."""
    rows = make_rows(ROWS, seed=3)
    for number, row in enumerate(rows):
        row["scores"] = [2.0 - 0.7 * rank - 0.1 * number for rank in row["ranks"]]
    model = stacked(base_folder, ("one", "second")).eval()
    with torch.no_grad():
        whole = [logps(model, row) for row in rows]
        model.base_model.set_adapter(["one"])
        below = [logps(model, row) for row in rows]
    return rows, whole, below


@pytest.mark.parametrize("number", range(len(CHOSEN)))
def test_the_loss_of_a_step(base_folder, tmp_path, measured, number):
    options = CHOSEN[number]
    rows, whole, below = measured
    model = stacked(base_folder, ("one", "second"))
    model.set_requires_grad("one", False)
    batch = ROWS // options["gradient_accumulation_steps"]
    options = {**options, "gradient_checkpointing": True, "max_steps": 1, "per_device_train_batch_size": batch}
    run = trainer(model, tmp_path, rows, **options)
    expected = expected_loss(options, rows, whole, below)
    largest = max(abs(value) for sums in [*whole, *below] for value in sums)
    bound = rounding(operations_of(model), max(abs(expected), largest))
    assert run.train().training_loss == pytest.approx(expected, abs=bound), options
