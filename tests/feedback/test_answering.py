"""Every question asked once, whatever fails beside it."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from tuna_peft.errors import UserError
from tuna_peft.feedback import answering
from tuna_peft.feedback.answering import MAX_FAILURES_IN_A_ROW, answer_all
from tuna_peft.feedback.server import NoAnswer
from tuna_peft.feedback.spending import CostLimitReached
from tuna_peft.journal import Journal

PATIENCE = 300.0  # seconds, of which a test that passes needs none
QUESTIONS = {str(i): i for i in range(200)}


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


@pytest.mark.parametrize("in_flight", [None, 1, 32])
def test_each_question_is_asked_once(journal, in_flight):
    asked = []

    def ask(i):
        asked.append(i)
        return i * i

    journal.add("3", "of an earlier run")
    outcome = answer_all(journal, QUESTIONS, ask, in_flight=in_flight)
    assert (outcome.found, outcome.asked, outcome.unanswered) == (1, 199, {})
    assert sorted(asked) == [i for i in range(200) if i != 3]
    assert [journal[str(i)] for i in range(5)] == [0, 1, 4, "of an earlier run", 16]
    assert answer_all(journal, QUESTIONS, ask, in_flight=in_flight).found == len(asked) + 1 == 200


def test_as_many_at_once_as_allowed_and_no_more(journal):
    barrier, guard, now, most = threading.Barrier(4), threading.Lock(), [0], [0]

    def ask(i):
        with guard:
            now[0] += 1
            most[0] = max(most[0], now[0])
        barrier.wait(timeout=PATIENCE)  # none gets on before four are there
        with guard:
            now[0] -= 1

    answer_all(journal, QUESTIONS, ask, in_flight=4)
    assert most == [4]


@pytest.mark.parametrize(
    ("in_flight", "every"),
    # Of several threads any may be late, so that many failures could come in a row: there are few of them.
    [(None, 10), (1, 10), (8, 40)],
)
def test_a_failed_question_costs_itself(journal, in_flight, every):
    def ask(i):
        if i % every == 0:
            raise NoAnswer("nothing came")
        return i

    failed = range(0, 200, every)
    outcome = answer_all(journal, QUESTIONS, ask, in_flight=in_flight)
    assert outcome.asked == 200 - len(failed)
    assert outcome.unanswered == {str(i): "nothing came" for i in failed}
    assert "0" not in journal
    assert answer_all(journal, QUESTIONS, lambda i: i).asked == len(failed)


@pytest.mark.parametrize("in_flight", [None, 1, 4])
def test_a_dead_server_ends_it(journal, in_flight):
    asked = []

    def ask(i):
        asked.append(i)
        if i >= 50:
            raise NoAnswer("no connection", where="http://host/v1", fix="Is it running?")
        return i

    with pytest.raises(
        UserError, match=r"(?s)in a row have failed, the last with: no connection.* 50 answers .*saved"
    ):
        answer_all(journal, QUESTIONS, ask, in_flight=in_flight)
    assert len(journal) == 50
    # Each of the other threads may be late with one good answer, and the counting then begins anew.
    assert len(asked) <= 50 + MAX_FAILURES_IN_A_ROW * (in_flight or 1)


@pytest.mark.parametrize("error", [CostLimitReached("enough"), ZeroDivisionError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("in_flight", [None, 1, 4])
def test_any_other_error_ends_it_and_keeps_what_was_under_way(journal, in_flight, error):
    failing, failed = [], threading.Event()

    def ask(i):
        if i == 60:
            failing.append(threading.current_thread())
            failed.set()
            raise error
        if i >= 58 and in_flight == 4:  # under way when it happens
            failed.wait(timeout=PATIENCE)
        if i > 61:
            failing[0].join(timeout=PATIENCE)  # it has said so by then
        return i

    with pytest.raises(type(error)):
        answer_all(journal, QUESTIONS, ask, in_flight=in_flight)
    assert all(str(i) in journal for i in range(60))
    assert len(journal) <= 60 + (in_flight or 1)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_ctrl_c_waits_for_all_requests_that_are_sent(journal, monkeypatch, in_flight):
    """Also for the thread on which the main thread waits at that moment."""
    all_ask, warned = threading.Barrier(in_flight), threading.Event()

    def ask(i):
        if all_ask.wait(timeout=PATIENCE) == 0:
            time.sleep(0.2)  # the main thread waits by now
            os.kill(os.getpid(), signal.SIGINT)
        warned.wait(timeout=PATIENCE)
        time.sleep(0.2)  # long enough for a main thread that does not wait
        return i

    monkeypatch.setattr(answering.logger, "warning", lambda message: warned.set())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            answer_all(journal, QUESTIONS, ask, in_flight=in_flight)
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(journal) == {str(i) for i in range(in_flight)}


def test_ctrl_c_before_all_threads_have_started_keeps_what_is_under_way(journal, monkeypatch):
    two_ask, waiting, started = threading.Barrier(3), threading.Event(), []

    class Thread(threading.Thread):
        def start(self):
            if len(started) == 2:
                two_ask.wait(timeout=PATIENCE)
                raise KeyboardInterrupt
            started.append(self)
            super().start()

    def ask(i):
        two_ask.wait(timeout=PATIENCE)
        waiting.wait(timeout=PATIENCE)
        return i

    monkeypatch.setattr(
        answering, "threading", SimpleNamespace(Thread=Thread, Lock=threading.Lock, Event=threading.Event)
    )
    monkeypatch.setattr(answering.logger, "warning", lambda message: waiting.set())
    with pytest.raises(KeyboardInterrupt):
        answer_all(journal, QUESTIONS, ask, in_flight=4)
    assert sorted(journal) == ["0", "1"]
