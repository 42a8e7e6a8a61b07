"""How far a judge agrees with people: accuracy, Cohen's kappa, and how much the order of showing decides."""

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
    """Pairs of responses, each with what people and the judge say: first, second, or tie.

    Args:
        pairs: Pairs that both decided.
        accuracy: Share of them with the same of the three.
        kappa: Cohen's kappa over the three: 0 is chance, 1 is full agreement.
        decided_accuracy: The same share where neither says tie; None without such pairs.
        majority: Accuracy of always saying what people say most often.
        judge_ties: Share of ties in what the judge says.
        position_bias: Share of pairs whose better response depends on which is shown first; None for a program.
        first_shown: Where it depends, the share in which the one shown first wins; None where it never does.
        annotators_accuracy, annotators_kappa: The same between two annotators, over all couples of them; None where
            there is one.
        without_majority: Pairs left out because annotators have no majority.
        unjudged: Pairs left out because the judge could not be read.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        left_out = f"{self.without_majority:,} without a majority, {self.unjudged:,} that the judge left open"
        found = [
            f"agreement with people on {self.pairs:,} pairs ({left_out})",
            f"  accuracy          {self.accuracy:.3f}   (always the most frequent label: {self.majority:.3f})",
            f"  Cohen's kappa     {self.kappa:.3f}",
        ]
        if self.decided_accuracy is not None:
            found.append(
                f"  without ties      {self.decided_accuracy:.3f}   (ties by the judge: {self.judge_ties:.3f})"
            )
        if self.position_bias is not None:
            toward = (
                "" if self.first_shown is None else f"   (the one shown first wins {self.first_shown:.0%} of these)"
            )
            found.append(f"  position bias     {self.position_bias:.3f}{toward}")
        if self.annotators_accuracy is not None:
            kappa = f"   (two annotators; kappa {self.annotators_kappa:.3f})"
            found.append(f"  people themselves {self.annotators_accuracy:.3f}{kappa}")
        return found


class Validation:
    """A judge on responses that people have compared; models are asked in both orders.

    Args:
        people: See `read_people`.
        settings: The judge.
        journal: Where its answers are kept.
        again, device: As in `Judging`.
    """

    def __init__(
        self,
        people: Sequence[People],
        settings: JudgeSettings,
        journal: Journal,
        *,
        again: bool = False,
        device: str = "auto",
    ):
        self.people = people
        settings = settings.model_copy(update={"both_orders": settings.function is None})
        self.judging = Judging([person.row for person in people], settings, journal, again=again, device=device)

    def measure(self, where: str) -> tuple[Agreement, JudgeReport]:
        """Asks what is missing and compares.

        Args:
            where: The data's name, for the error.

        Raises:
            UserError: As `judge_rows`; or nothing can be compared.
        """
        rankings, report = self.judging.rankings("validating")
        said: list[tuple[int, int]] = []
        compared = dependent = first_wins = 0
        for person, ranking in zip(self.people, rankings, strict=True):
            if ranking.ranks is None:
                continue
            if person.signs is not None:
                said += zip(person.signs, pair_signs(ranking.ranks), strict=True)
            if len(ranking.each) == 2:
                one_way, other_way = map(pair_signs, ranking.each)
                compared += len(one_way)
                for one, other, earlier in zip(one_way, other_way, pair_signs(ranking.shown), strict=True):
                    dependent += one * other < 0
                    first_wins += one * other < 0 and one == earlier
        if not said:
            reasons = report.left_out or "no majority among annotators"
            raise UserError(f"none of {len(self.people)} records can be compared: {reasons}", where=where)
        decided = [(a, b) for a, b in said if a and b]
        couples = [couple for person in self.people for couple in person.couples]
        return Agreement(
            pairs=len(said),
            accuracy=_accuracy(said),
            kappa=cohens_kappa(said),
            decided_accuracy=_accuracy(decided) if decided else None,
            majority=max(Counter(human for human, _ in said).values()) / len(said),
            judge_ties=sum(judge == 0 for _, judge in said) / len(said),
            position_bias=dependent / compared if compared else None,
            first_shown=first_wins / dependent if dependent else None,
            annotators_accuracy=_accuracy(couples) if couples else None,
            annotators_kappa=cohens_kappa(couples) if couples else None,
            without_majority=sum(person.signs is None for person in self.people),
            unjudged=sum(ranking.ranks is None for ranking in rankings),
        ), report


@dataclasses.dataclass(frozen=True)
class People:
    """What people say about a row.

    Args:
        row: `{"id", "prompt", "completions", "record"}`.
        signs: For each pair i < j of completions 1, -1 or 0, see `pair_signs`; None without a majority.
        couples: What two annotators say about the same pair, for all couples of annotators.
    """

    row: Record
    signs: list[int] | None
    couples: list[tuple[int, int]]


def read_people(source: DataSource, prompt: PromptConfig) -> list[People]:
    """Reads responses that people have compared: PandaLM's test set, or any ranked data.

    Raises:
        UserError: The source cannot be read.
    """
    raw_records = read_records(source)
    _, first = raw_records[0]
    if not first.keys() >= _PANDALM:
        ranked, _ = read_ranked(source, prompt, pairs=False)
        return [_shuffled(record) for record in ranked]
    template = PromptTemplate(prompt)
    return [_pandalm(raw, where, template) for where, raw in raw_records]


def _shuffled(record: Record) -> People:
    """Not best first: else "the first is better" would always be right, and kappa would have nothing to correct."""
    order = list(range(len(record["ranks"])))
    random.Random(content_key(record=record)).shuffle(order)
    row = {**record, "completions": [record["completions"][i] for i in order], "record": record}
    return People(row, pair_signs([record["ranks"][i] for i in order]), [])


def _pandalm(raw: Record, where: str, template: PromptTemplate) -> People:
    labels = [value for key, value in sorted(raw.items()) if key.startswith("annotator")]
    if not labels or not all(label in _PANDALM_SIGNS for label in labels):
        raise UserError(f"the annotations {labels} are not 1, 2 or 0 (tie)", where=where)
    signs = [_PANDALM_SIGNS[label] for label in labels]
    [(most, votes)] = Counter(signs).most_common(1)
    row = {
        "id": str(raw.get("idx", where)),
        "prompt": template.render(raw["instruction"], raw.get("input"), where),
        # The file holds the response "True" as a truth value. Empty responses were judged by people, too: both stay.
        "completions": [str(raw["response1"]), str(raw["response2"])],
        "record": raw,
    }
    majority = [most] if 2 * votes > len(signs) else None
    return People(row, majority, list(itertools.combinations(signs, 2)))


def cohens_kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Cohen's kappa of two raters (Cohen 1960): (observed - chance) / (1 - chance) agreement.

    Args:
        pairs: What the one and the other say about the same thing. 1.0 if both say the same single thing throughout.
    """
    one, other = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(one[label] * other[label] for label in one) / len(pairs) ** 2
    return 1.0 if chance == 1 else (_accuracy(pairs) - chance) / (1 - chance)


def _accuracy(pairs: Iterable[tuple[int, int]]) -> float:
    same = [a == b for a, b in pairs]
    return sum(same) / len(same)
