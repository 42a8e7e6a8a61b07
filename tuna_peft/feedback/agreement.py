"""Agreement of a judge with human annotators: accuracy, Cohen's kappa and position bias.

Used by `tuna-peft judge --validate`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import read_ranked
from tuna_peft.data.ranked import Record
from tuna_peft.data.sources import read_records
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError
from tuna_peft.feedback.judge import JudgeReport, Judging, pair_signs
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.journal import Journal, content_key

_PANDALM = {"instruction", "response1", "response2"}
_PANDALM_SIGNS = {1: 1, 2: -1, 0: 0}


@dataclasses.dataclass
class Agreement:
    """Agreement on pairs of responses, each of which people and the judge label: first, second or tie.

    Args:
        pairs: Number of pairs that have both labels.
        accuracy: Share of pairs with equal labels.
        kappa: Cohen's kappa of the labels: 0 is chance, 1 is full agreement.
        decided_accuracy: Accuracy on the pairs that neither label calls a tie; None without such pairs.
        majority: Accuracy of a judge that always gives the label that people give most often.
        judge_ties: Share of ties among the judge's labels.
        position_bias: Share of pairs in which the judge changes its mind with the order of the responses; None for a
            Python function.
        first_shown: Share of these pairs in which the response shown first wins; None without such pairs.
        annotators_accuracy, annotators_kappa: Accuracy and kappa between two annotators, over all couples of them;
            None where there is only one annotator.
        without_majority: Number of pairs skipped because the annotators have no majority.
        unjudged: Number of rows skipped because they have no ranking by the judge.
    """

    pairs: int
    accuracy: float
    kappa: float
    decided_accuracy: float | None
    majority: float
    judge_ties: float
    position_bias: float | None
    first_shown: float | None
    annotators_accuracy: float | None
    annotators_kappa: float | None
    without_majority: int
    unjudged: int

    def lines(self) -> list[str]:
        """Lines of text for the terminal."""
        left_out = f"skipped: {self.without_majority:,} without a majority, {self.unjudged:,} without a verdict"
        found = [
            f"agreement with people on {self.pairs:,} pairs ({left_out})",
            f"  accuracy          {self.accuracy:.3f}   (always the most frequent label: {self.majority:.3f})",
            f"  Cohen's kappa     {self.kappa:.3f}",
        ]
        if self.decided_accuracy is not None:
            ties = f"   (ties by the judge: {self.judge_ties:.3f})"
            found.append(f"  without ties      {self.decided_accuracy:.3f}{ties}")
        if self.position_bias is not None:
            first = self.first_shown
            toward = "" if first is None else f"   (the response shown first wins {first:.0%} of these)"
            found.append(f"  position bias     {self.position_bias:.3f}{toward}")
        if self.annotators_accuracy is not None:
            kappa = f"   (agreement of two annotators; kappa {self.annotators_kappa:.3f})"
            found.append(f"  annotators        {self.annotators_accuracy:.3f}{kappa}")
        return found


def validation(rows: Sequence[AnnotatedRow], settings: JudgeSettings, journal: Journal, **options: Any) -> Judging:
    """A judge of rows that people have compared; one that is a model is asked in both orders. See `Judging`."""
    settings = settings.model_copy(update={"both_orders": settings.function is None})
    return Judging([one.row for one in rows], settings, journal, **options)


def measure_agreement(
    rows: Sequence[AnnotatedRow], judging: Judging, where: str | None = None
) -> tuple[Agreement, JudgeReport]:
    """Asks the questions that have no answer yet, and compares the judge's labels with those of people.

    Args:
        rows: See `read_annotated_rows`.
        judging: See `validation`, of the same rows.
        where: Name of the data, for errors.

    Raises:
        UserError: See `judge_rows`; or no pair has both labels.
    """
    rankings, report = judging.rankings("validating")
    labels: list[tuple[int, int]] = []
    compared = dependent = first_wins = 0
    for row, ranking in zip(rows, rankings, strict=True):
        if ranking.ranks is None:
            continue
        if row.signs is not None:
            labels += zip(row.signs, pair_signs(ranking.ranks), strict=True)
        if len(ranking.each) == 2:
            one_way, other_way = map(pair_signs, ranking.each)
            compared += len(one_way)
            for one, other, earlier in zip(one_way, other_way, pair_signs(ranking.shown), strict=True):
                dependent += one * other < 0
                first_wins += one * other < 0 and one == earlier
    if not labels:
        reasons = report.left_out or "no majority among annotators"
        raise UserError(f"none of {len(rows)} records can be compared: {reasons}", where=where)
    decided = [(a, b) for a, b in labels if a and b]
    couples = [couple for row in rows for couple in row.annotator_pairs]
    return Agreement(
        pairs=len(labels),
        accuracy=_accuracy(labels),
        kappa=cohens_kappa(labels),
        decided_accuracy=_accuracy(decided) if decided else None,
        majority=max(Counter(human for human, _ in labels).values()) / len(labels),
        judge_ties=sum(judge == 0 for _, judge in labels) / len(labels),
        position_bias=dependent / compared if compared else None,
        first_shown=first_wins / dependent if dependent else None,
        annotators_accuracy=_accuracy(couples) if couples else None,
        annotators_kappa=cohens_kappa(couples) if couples else None,
        without_majority=sum(row.signs is None for row in rows),
        unjudged=sum(ranking.ranks is None for ranking in rankings),
    ), report


@dataclasses.dataclass(frozen=True)
class AnnotatedRow:
    """A row of responses with the labels that people gave them.

    Args:
        row: `{"id", "prompt", "completions", "record"}`.
        signs: The majority's label of each pair i < j of completions, see `pair_signs`; None without a majority.
        annotator_pairs: The labels that two annotators give to the same pair, for all couples of annotators.
    """

    row: Record
    signs: list[int] | None
    annotator_pairs: list[tuple[int, int]]


def read_annotated_rows(source: DataSource, prompt: PromptConfig) -> list[AnnotatedRow]:
    """Reads responses that people have compared: PandaLM's test set, or any ranked data.

    Raises:
        UserError: The source cannot be read.
    """
    _, first = next(read_records(source))
    if not first.keys() >= _PANDALM:
        ranked, _ = read_ranked(source, prompt, pairs=False)
        return [_shuffled(record) for record in ranked]
    template = PromptTemplate(prompt)
    return [_pandalm(raw, where, template) for where, raw in read_records(source)]


def _shuffled(record: Record) -> AnnotatedRow:
    # If the best response always stood first, "the first is better" would always be right, and kappa could not tell
    # agreement from chance.
    order = list(range(len(record["ranks"])))
    random.Random(content_key(record=record)).shuffle(order)
    row = {**record, "completions": [record["completions"][i] for i in order], "record": record}
    return AnnotatedRow(row, pair_signs([record["ranks"][i] for i in order]), [])


def _pandalm(raw: Record, where: str, template: PromptTemplate) -> AnnotatedRow:
    labels = [value for key, value in sorted(raw.items()) if key.startswith("annotator")]
    if not labels or not all(label in _PANDALM_SIGNS for label in labels):
        raise UserError(f"the annotations {labels} are not 1, 2 or 0 (tie)", where=where)
    signs = [_PANDALM_SIGNS[label] for label in labels]
    [(most, votes)] = Counter(signs).most_common(1)
    row = {
        "id": str(raw.get("idx", where)),
        "prompt": template.render(raw["instruction"], raw.get("input"), where),
        # The file stores the response "True" as a boolean. Empty responses stay: people judged them, too.
        "completions": [str(raw["response1"]), str(raw["response2"])],
        "record": raw,
    }
    majority = [most] if 2 * votes > len(signs) else None
    return AnnotatedRow(row, majority, list(itertools.combinations(signs, 2)))


def cohens_kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Cohen's kappa of two raters (Cohen 1960): (observed - chance) / (1 - chance) agreement.

    Args:
        pairs: The two raters' labels of each item. If both give one and the same label to all items, kappa is 1.0.
    """
    one, other = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(one[label] * other[label] for label in one) / len(pairs) ** 2
    return 1.0 if chance == 1 else (_accuracy(pairs) - chance) / (1 - chance)


def _accuracy(pairs: Iterable[tuple[int, int]]) -> float:
    same = [a == b for a, b in pairs]
    return sum(same) / len(same)
