"""Contextual ranking: a judge reads a prompt with all of its responses and ranks them.

Used by `tuna-peft judge`, by stages with `data.judge`, and by Vicuna QA (`judge_pairs`).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator, Sequence

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.ranked import Prompt, Record, dense_ranks, normalise, response_text
from tuna_peft.data.verdict import Unreadable, read_verdict
from tuna_peft.errors import UserError
from tuna_peft.feedback.counts import Counts
from tuna_peft.feedback.judges import Question, failed, make_judge
from tuna_peft.feedback.protocol import MAX_RESPONSES
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.feedback.spending import Estimate, Spending, Usage, estimate_tokens
from tuna_peft.journal import Journal, content_key


@dataclasses.dataclass
class JudgeReport(Counts):
    """How many rows were ranked, and what was asked for that.

    Args:
        rows: Number of rows.
        ranked: Number of rows with a ranking in which two responses differ in rank.
        found: Number of questions that the journal had an answer to.
        asked: Number of questions answered now.
        own_best, own_not_best: With `include_judge_answer`: number of rows in which the judge ranks its own response
            first, and of rows in which it does not (its response is then not used).
        pairs, pairs_reversed: With `both_orders`: number of pairs of responses, and of pairs whose better response
            depends on the order.
        tokens_in, tokens_out, cost: Totals of all answers, those of the journal included; 0 where nothing is counted.
    """

    rows: int = 0
    ranked: int = 0
    found: int = 0
    asked: int = 0
    own_best: int = 0
    own_not_best: int = 0
    pairs: int = 0
    pairs_reversed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The ranking of one row's responses.

    Args:
        ranks: Rank of each completion, dense from 0, equal for ties; None without a ranking.
        each: The ranks from each order in which the responses were shown.
        shown: Position of each completion in the first of these orders.
        scores: Scores by a Python function; None for other judges.
        own_response: The judge's own response, if the judge ranks it first; else None.
        reason: Why there is no ranking.
    """

    ranks: list[int] | None = None
    each: tuple[list[int], ...] = ()
    shown: tuple[int, ...] = ()
    scores: list[float] | None = None
    own_response: str | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The questions about a row: its completions as different texts, and the order of each question, by key."""

    distinct: list[str]
    orders: dict[str, tuple[int, ...]]


def judge_rows(
    rows: Sequence[Record],
    settings: JudgeSettings,
    journal_path: str | os.PathLike[str],
    *,
    device: str = "auto",
    description: str = "judging",
) -> tuple[list[Record], JudgeReport]:
    """Ranks the completions of each row. After an interruption it only asks the questions without an answer.

    Args:
        rows: `{"id", "prompt", "completions"}`, optional `reference` and `record` (for Python functions), as
            `load_candidates` returns them.
        settings: Which judge, and how it is asked.
        journal_path: File that caches the answers, see `Journal`.
        device: Where a judge on this machine runs, see `load_local_model`.

    Returns:
        Records of the ranked type, in the order of `rows`, and the counts.

    Raises:
        UserError: No row could be ranked, no question had an answer, some had none and `on_no_answer` is `error`, or
            the limit of the cost was reached. All answers so far are in the journal.
    """
    with Journal(journal_path) as journal:
        return Judging(rows, settings, journal, device=device).records(description)


def judge_pairs(
    rows: Sequence[Record],
    settings: JudgeSettings,
    journal_path: str | os.PathLike[str],
    *,
    device: str = "auto",
    description: str = "judging pairs",
) -> tuple[list[int | None], JudgeReport]:
    """Compares two responses to each prompt, see `judge_rows`.

    Args:
        rows: `{"id", "prompt", "completions"}` with two completions each.

    Returns:
        For each row 1 if the first is better, -1 if the second is, 0 for a tie (with `both_orders` also where the
        orders disagree), None without a ranking; and the counts.

    Raises:
        UserError: See `judge_rows`; rows without a ranking are no error.
    """
    with Journal(journal_path) as journal:
        rankings, report = Judging(rows, settings, journal, device=device).rankings(description)
    return [None if ranking.ranks is None else pair_signs(ranking.ranks)[0] for ranking in rankings], report


class Judging:
    """Asks one judge about some rows.

    Args:
        rows: As in `judge_rows`.
        settings: Which judge, and how it is asked.
        journal: Must stay open while this object is used.
        again: Ask again where the journal says that an answer could not be read.
        device: Where a judge on this machine runs, see `load_local_model`.
    """

    def __init__(
        self,
        rows: Sequence[Record],
        settings: JudgeSettings,
        journal: Journal,
        *,
        again: bool = False,
        device: str = "auto",
    ):
        self.rows, self.settings, self.journal, self.again = rows, settings, journal, again
        self.spending = Spending(settings.server)
        self.judge = make_judge(settings, self.spending, device=device)
        self.questions: dict[str, Question] = {}
        self._asked = [self._ask_about(row) for row in rows]

    def estimate(self) -> Estimate:
        """Estimate of the questions that `rankings` would ask."""
        missing = [question for key, question in self.questions.items() if key not in self.journal]
        found = len(self.questions) - len(missing)
        if self.settings.function is not None:
            return Estimate(found, len(missing), 0, 0, 0.0)
        sent = (sum(estimate_tokens(message["content"]) + 4 for message in one.messages) for one in missing)
        return self.spending.estimate(found, ((tokens_in, self.settings.max_tokens) for tokens_in in sent))

    def rankings(self, description: str = "judging") -> tuple[list[Ranking], JudgeReport]:
        """Asks the questions without an answer, and reads all answers.

        Returns:
            One `Ranking` for each row, and the counts (`ranked` counts those with ranks here).
        """
        report = JudgeReport(rows=len(self.rows))
        for key in self.questions:
            if key in self.journal:
                self.spending.count(Usage(1, *self.journal[key].get("usage", (0, 0))))
        answering = self.judge.answer(self.journal, self.questions, description)
        report.found, report.asked = answering.found, answering.asked
        unanswered = answering.unanswered
        none = len(unanswered) == len(self.questions)
        if unanswered and (none or self.settings.on_no_answer == "error"):
            key, reason = next(iter(unanswered.items()))
            what = f"{len(unanswered)} of {len(self.questions)} questions have no answer; the first: {reason}"
            fix = (
                "All other answers are saved: run the same command again to ask these, or set `on_no_answer: skip` "
                "(--on-no-answer skip) to skip their prompts."
            )
            raise UserError(what, where=self.questions[key].where, fix=None if none else fix)
        rankings = [self._ranking(row, asked) for row, asked in zip(self.rows, self._asked, strict=True)]
        for ranking in rankings:
            if ranking.reason is not None:
                report.count_skipped(ranking.reason)
                continue
            report.ranked += 1
            if len(ranking.each) == 2:
                one_way, other_way = map(pair_signs, ranking.each)
                report.pairs += len(one_way)
                report.pairs_reversed += sum(a * b < 0 for a, b in zip(one_way, other_way, strict=True))
            if self.settings.include_judge_answer:
                report.own_best += ranking.own_response is not None
                report.own_not_best += ranking.own_response is None
        usage = self.spending.usage
        report.tokens_in, report.tokens_out, report.cost = usage.tokens_in, usage.tokens_out, self.spending.cost
        return rankings, report

    def records(self, description: str = "judging") -> tuple[list[Record], JudgeReport]:
        """See `judge_rows`."""
        rankings, report = self.rankings(description)
        records = []
        for row, ranking in zip(self.rows, rankings, strict=True):
            if ranking.ranks is None:
                continue
            try:
                records.append(normalise(self._record(row, ranking), str(row.get("id"))).record)
            except BadRow as error:
                report.count_skipped(error.reason)
        report.ranked = len(records)
        if not records:
            answers = (self.journal[key] for key in self.questions if key in self.journal)
            failure = next((f" The first failure: {answer['failed']}." for answer in answers if failed(answer)), "")
            raise UserError(
                f"the judge ranked none of {len(self.rows)} prompts ({report.reasons()})",
                fix=f"Read its answers in the journal: can this model follow the instructions?{failure}",
            )
        return records, report

    def _ask_about(self, row: Record) -> _Asked:
        distinct = list(dict.fromkeys(map(response_text, row["completions"])))
        asked = _Asked(distinct, {})
        for order in self._orders(row["prompt"], distinct):
            question = Question(
                prompt=row["prompt"],
                responses=tuple(distinct[i] for i in order),
                record=row.get("record") or row,
                guidance=self.settings.instructions,
                where=f"prompt {row.get('id')}",
            )
            key = self._current(content_key(kind="judge", **self.judge.key_parts(question)))
            asked.orders[key] = order
            self.questions[key] = question
        return asked

    def _orders(self, prompt: Prompt, responses: list[str]) -> Iterator[tuple[int, ...]]:
        """The orders in which responses are shown; none if there are too few or too many responses."""
        count = len(responses)
        if not 2 <= count <= MAX_RESPONSES:
            return
        if self.settings.function is not None:
            yield tuple(range(count))
            return
        # Seeded by content, so that the order does not depend on the row's place in the file.
        order = list(range(count))
        content = content_key(prompt=prompt, responses=responses)
        random.Random(f"{self.settings.seed} {content}").shuffle(order)
        yield tuple(order)
        if self.settings.both_orders:
            yield tuple(reversed(order))

    def _current(self, key: str) -> str:
        """The key of the last attempt at a question: with `again`, a new key follows each attempt that failed."""
        while key in self.journal and failed(self.journal[key]):
            following = content_key(again=key)
            if following not in self.journal and not self.again:
                break
            key = following
        return key

    def _ranking(self, row: Record, asked: _Asked) -> Ranking:
        count = len(asked.distinct)
        if count > MAX_RESPONSES:
            return Ranking(reason=f"more than {MAX_RESPONSES} responses")
        if count < 2:
            tied = [0] * len(row["completions"])
            return Ranking(tied, (tied,)) if len(tied) > 1 else Ranking(reason="one response")
        if any(key not in self.journal for key in asked.orders):
            return Ranking(reason="no answer")
        answers = [self.journal[key] for key in asked.orders]
        if any(failed(answer) for answer in answers):
            return Ranking(reason="unreadable")
        place = {text: i for i, text in enumerate(asked.distinct)}
        places = [place[response_text(response)] for response in row["completions"]]
        if self.settings.function is not None:
            scores = [answers[0]["scores"][i] for i in places]
            ranks = dense_ranks([-score for score in scores])
            return Ranking(ranks, (ranks,), scores=scores)
        try:
            verdicts = [read_verdict(answer["text"], count) for answer in answers]
        except Unreadable:  # accepted by an earlier, less strict version of this package
            return Ranking(reason="unreadable")
        each = []
        for verdict, order in zip(verdicts, asked.orders.values(), strict=True):
            rank_of = dict(zip(order, verdict.ranks, strict=True))
            each.append([rank_of[i] for i in places])
        first = next(iter(asked.orders.values()))
        shown = tuple(first.index(i) for i in places)
        own = verdicts[0].own_response if all(verdict.own_is_best for verdict in verdicts) else None
        return Ranking(agreed_ranks(each), tuple(each), shown, own_response=own)

    def _record(self, row: Record, ranking: Ranking) -> Record:
        assert ranking.ranks is not None
        record: Record = {key: row.get(key) for key in ("id", "prompt", "completions", "reference", "tools")}
        record |= {"scores": ranking.scores, "ranks": ranking.ranks}
        own, wanted = ranking.own_response, self.settings.include_judge_answer
        if own is not None and wanted == "reference":
            record["reference"] = own
        elif own is not None and wanted:
            record["completions"] = [*row["completions"], own]
            record["ranks"] = [*ranking.ranks, -1]
        return record


def agreed_ranks(each: Sequence[Sequence[int]]) -> list[int]:
    """The ranks on which several rankings of the same responses agree; where they disagree, responses are tied.

    If two rankings order a pair of responses differently, the pair and every response ranked between them become ties:
    ranks cannot express "a over c" when b is tied with both. The result is the finest ranking that none contradicts.

    Args:
        each: Each ranking as dense ranks of the responses.
    """
    count = len(each[0])
    # A boundary after the k best responses is kept if all rankings have the same k best responses.
    cuts = [
        {frozenset(i for i in range(count) if ranks[i] <= level) for level in range(max(ranks) + 1)} for ranks in each
    ]
    common = set.intersection(*cuts)
    return dense_ranks([-sum(i in best for best in common) for i in range(count)])


def pair_signs(ranks: Sequence[int]) -> list[int]:
    """For each pair i < j: 1 if i is better, -1 if j is, 0 for a tie."""
    return [(b > a) - (b < a) for a, b in itertools.combinations(ranks, 2)]
