"""Asks many questions in parallel and saves each answer in the journal as it arrives."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from tuna_peft.errors import UserError
from tuna_peft.feedback.server import RequestFailed
from tuna_peft.journal import Journal
from tuna_peft.progress import Progress

Question = TypeVar("Question")
logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 8
"""After this many failures in a row the server, not a single question, is the likely reason: all work stops."""


@dataclasses.dataclass
class Answering:
    """How many questions were answered.

    Args:
        found: Number of questions that the journal had an answer to.
        asked: Number of questions answered now.
        unanswered: The reason for each question that has no answer, by key. The journal does not have it, so that
            the next run asks it again.
    """

    found: int = 0
    asked: int = 0
    unanswered: dict[str, str] = dataclasses.field(default_factory=dict)


def answer_all(
    journal: Journal,
    questions: Mapping[str, Question],
    ask: Callable[[Question], Any],
    *,
    in_flight: int | None = None,
    description: str = "asking",
) -> Answering:
    """Puts an answer to every question into the journal.

    Ctrl-C waits for the requests that are already sent and keeps their answers; a second Ctrl-C does not wait.

    Args:
        journal: Questions whose key it has are not asked again.
        questions: By key, see `tuna_peft.journal.content_key`.
        ask: Returns the answer, a JSON value. After `RequestFailed` only this question has no answer; any other
            exception stops all, once the requests that are already sent have their answers.
        in_flight: Number of threads that ask. None asks in the current thread, and Ctrl-C does not wait: a user's
            Python function may need the main thread.

    Raises:
        UserError: `MAX_FAILURES_IN_A_ROW` requests in a row have failed.
    """
    missing = [key for key in questions if key not in journal]
    outcome = Answering(found=len(questions) - len(missing))
    with Progress(description, len(missing), "questions") as progress:
        run = _Run(journal, questions, ask, iter(missing), outcome, progress)
        if in_flight is None:
            run.work()
        else:
            _in_threads(run, min(in_flight, len(missing)))
    if run.error is not None:
        raise run.error
    if run.last_failure is not None:
        kept = f"The {outcome.found + outcome.asked} answers so far are saved: "
        raise UserError(
            f"{MAX_FAILURES_IN_A_ROW} requests in a row have failed, the last with: {run.last_failure.what}",
            where=run.last_failure.where,
            fix=f"{kept}run the same command again to resume. {run.last_failure.fix or ''}".rstrip(),
        )
    return outcome


def _in_threads(run: _Run, count: int) -> None:
    # Not `Thread.join`: on Python 3.11, a join that Ctrl-C interrupts marks a running thread as finished (because of
    # the fix for bpo-45274), and its answer would be lost.
    ends = [threading.Event() for _ in range(count)]
    begun: list[threading.Event] = []

    def work(end: threading.Event) -> None:
        begun.append(end)
        try:
            run.work()
        finally:
            end.set()

    try:
        for end in ends:
            # Daemon threads: Python does not wait for them when a second Ctrl-C ends it.
            threading.Thread(target=work, args=(end,), daemon=True).start()
        for end in ends:
            end.wait()
    except KeyboardInterrupt:
        run.stopped = True  # a thread that begins after this asks nothing
        logger.warning("waiting for the answers to requests already sent; press Ctrl-C again to stop without them")
        for end in list(begun):
            end.wait()
        raise


@dataclasses.dataclass
class _Run:
    """State shared by the threads of one `answer_all`. Once `stopped`, no further question is asked."""

    journal: Journal
    questions: Mapping[str, Any]
    ask: Callable[[Any], Any]
    left: Iterator[str]
    outcome: Answering
    progress: Progress
    error: BaseException | None = None
    last_failure: RequestFailed | None = None
    stopped: bool = False
    failures_in_a_row: int = 0
    guard: Any = dataclasses.field(default_factory=threading.Lock)

    def work(self) -> None:
        """Asks until nothing is left."""
        while (key := self._next()) is not None:
            try:
                answer = self.ask(self.questions[key])
                self.journal.add(key, answer)
            except RequestFailed as failure:
                self._failed(key, failure)
            except BaseException as error:
                with self.guard:
                    self.error = self.error or error
                self.stopped = True
            else:
                with self.guard:
                    self.outcome.asked += 1
                    self.failures_in_a_row = 0
                    self.progress.update()

    def _next(self) -> str | None:
        with self.guard:
            return None if self.stopped else next(self.left, None)

    def _failed(self, key: str, failure: RequestFailed) -> None:
        with self.guard:
            self.outcome.unanswered[key] = failure.what
            self.failures_in_a_row += 1
            self.progress.update()
            if self.failures_in_a_row == MAX_FAILURES_IN_A_ROW:
                self.last_failure = failure
                self.stopped = True
