"""A server with every fault, 1,000 prompts at 32 in flight, and `kill -9`: nothing lost, nothing asked twice."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from honest_judge import grade, honest, rows, shown, verdict
from scripted_server import Answer, Drop, Hang, chat, error, scripted_server

from tuna_peft.errors import UserError
from tuna_peft.feedback.judge import judge_rows
from tuna_peft.feedback.settings import JudgeSettings, ServerSettings
from tuna_peft.files import write_jsonl
from tuna_peft.journal import Journal

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds, of which a test that passes needs few

NO_ANSWER = [
    error(429, headers={"Retry-After": "0.02"}),
    error(500),
    error(503, headers={"Retry-After": "nonsense"}),
    Drop(200, {"choices": [{"message": {"content": '{"rank": [4, 3, 2, 1, 0]}'}}]}),
]
"""The client asks again by itself."""


def no_ranking(asked):
    """Answers that must not become a ranking, each of another kind."""
    n = len(shown(asked))
    return [
        Answer(200, b'{"choices": [{"message"'),
        Answer(200, b"<html>busy</html>"),
        chat(verdict(asked)[:-15], finish="length"),
        chat(verdict(asked)[: len(verdict(asked)) // 2]),
        chat(json.dumps({"rank": list(range(n - 1))})),
        chat(json.dumps({"rank": list(range(n + 3))})),
        chat(json.dumps({"rank": [0] * n})),
        chat("rank: [9, 8, 7, 6]"),
        chat(None),
        chat(""),
        chat("I cannot rank these."),
    ]


class Faulty:
    """The first two requests of two prompts in three go wrong, each in a way of its own; then the answer is honest."""

    def __init__(self, share=2 / 3):
        self.share = share
        self.seen = collections.Counter()
        self.good = collections.Counter()
        self.guard = threading.Lock()

    def __call__(self, asked):
        prompt = asked.text.split("begins\n")[1].split("\n")[0]
        with self.guard:
            self.seen[prompt] += 1
            time_asked = self.seen[prompt]
        draw = random.Random(f"{prompt} {time_asked}")
        if time_asked <= 2 and draw.random() < self.share:
            return draw.choice(NO_ANSWER + no_ranking(asked))
        with self.guard:
            self.good[prompt] += 1
        return honest(asked)


def judged(url, given, journal, **server):
    settings = JudgeSettings(server=ServerSettings(base_url=url, model="judge", **server))
    return judge_rows(given, settings, journal)


def check(records, given):
    assert [record["id"] for record in records] == [row["id"] for row in given]
    for record, row in zip(records, given, strict=True):
        assert sorted(record["completions"]) == sorted(row["completions"])
        assert [grade(text) for text in record["completions"]] == sorted(map(grade, row["completions"]), reverse=True)


def test_every_fault_at_once(tmp_path):
    given, script = rows(60), Faulty()
    with scripted_server(script) as http:
        records, report = judged(http.url, given, tmp_path / "j.jsonl", in_flight=16)
    check(records, given)
    assert (report.ranked, report.left_out) == (60, {})
    assert set(script.good.values()) == {1}  # a good answer is the last thing that is asked for
    assert len(http.asked) > 100


@pytest.mark.parametrize(
    ("fault", "journaled"),
    [
        *((error(status), False) for status in (400, 401, 402, 404, 408, 409, 413, 422, 429, 500, 503)),
        (Drop(200, {"choices": []}), False),
        (Answer(200, b"no JSON"), True),
        (Answer(200, {"choices": []}), True),
        (chat(None), True),
        (chat("I cannot rank these."), True),
        (chat('{"rank": [0, 1, 2, 3]}', finish="length"), True),
    ],
)
def test_only_what_a_judge_said_is_journaled(tmp_path, fault, journaled):
    """What a server could not answer is asked again by the next run; what cannot be read is paid for once."""
    with scripted_server(lambda asked: fault) as http, pytest.raises(UserError):
        judged(http.url, rows(2), tmp_path / "j.jsonl", max_retries=1)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert ["failed" in journal[key] for key in journal] == ([True, True] if journaled else [])


def test_an_answer_that_never_comes_is_asked_for_again(tmp_path):
    """By itself: a time-out that is short enough to wait for can meet the good answers of a busy machine as well."""
    given = rows(3)
    with scripted_server(lambda asked: Hang(600.0) if asked.number == 0 else honest(asked)) as http:
        records, report = judged(http.url, given, tmp_path / "j.jsonl", timeout=1.0, max_retries=20)
    check(records, given)
    assert report.ranked == 3 and len(http.asked) > 3


def test_1000_prompts_with_32_in_flight(tmp_path):
    given, script = rows(1000), Faulty(share=0.02)
    together = threading.Barrier(32)

    def meets(asked):
        if asked.number < 32:
            together.wait(timeout=PATIENCE)  # breaks if not 32 are there at once
        return script(asked)

    with scripted_server(meets) as http:
        records, report = judged(http.url, given, tmp_path / "j.jsonl", in_flight=32)
    check(records, given)
    assert report.asked == 1000 and http.most_open == 32
    assert set(script.good.values()) == {1} and len(script.good) == 1000


# kill -9


PROGRAM = """
import json, sys
from tuna_peft.feedback.judge import judge_rows
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.files import write_jsonl

url, data, journal, out = sys.argv[1:]
settings = JudgeSettings.model_validate(
    {"server": {"base_url": url, "model": "judge", "in_flight": 8, "max_retries": 20}, "both_orders": True}
)
records, _ = judge_rows([json.loads(line) for line in open(data)], settings, journal)
write_jsonl(out, records)
"""


def check_killed(tmp_path, count, kills, seed):
    """Runs of one job, all but the last killed after a random number of answers, against one that nobody disturbs."""
    draw, answered, given = random.Random(seed), threading.Semaphore(0), rows(count)
    last = threading.Event()

    def script(asked):
        if asked.text == http.asked[0].text:
            last.wait(timeout=PATIENCE)  # so that no run is whole before it is killed, however late that is
        time.sleep(0.002)
        answered.release()
        return honest(asked)

    write_jsonl(tmp_path / "data.jsonl", given)
    with scripted_server(script) as http:
        files = [tmp_path / name for name in ("data.jsonl", "journal.jsonl", "out.jsonl")]
        command = [sys.executable, "-c", PROGRAM, http.url, *map(str, files)]
        for _ in range(kills):
            run = subprocess.Popen(command)
            for _ in range(draw.randint(1, 2 * count // (kills + 1))):
                assert answered.acquire(timeout=PATIENCE)
            time.sleep(draw.random() * 0.01)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        last.set()
        subprocess.run(command, check=True)
    # At most what was under way when the process died is asked again.
    assert 2 * count <= len(http.asked) <= 2 * count + 8 * kills

    with scripted_server(honest) as http:
        settings = JudgeSettings(server=ServerSettings(base_url=http.url, model="judge"), both_orders=True)
        records, _ = judge_rows(given, settings, tmp_path / "straight.journal.jsonl")
    write_jsonl(tmp_path / "straight.jsonl", records)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_kill_9(tmp_path):
    check_killed(tmp_path, count=30, kills=2, seed=0)


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_of_500_prompts(tmp_path):
    check_killed(tmp_path, count=500, kills=20, seed=1)


def test_ctrl_c_keeps_what_is_under_way(tmp_path):
    asked_for, going = threading.Event(), threading.Event()

    def script(asked):
        if asked.number == 20:
            asked_for.set()
        if asked.number >= 20:
            going.wait(timeout=PATIENCE)
        return honest(asked)

    write_jsonl(tmp_path / "data.jsonl", rows(200))
    with scripted_server(script) as http:
        command = [sys.executable, "-m", "tuna_peft", "judge", "data.jsonl", "out.jsonl", "--model", "judge"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        run = subprocess.Popen(
            [*command, "--server", http.url], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment,
            # A test suite in the background of a script has Ctrl-C ignored, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert asked_for.wait(timeout=PATIENCE)
        run.send_signal(signal.SIGINT)
        while not (line := run.stderr.readline()).startswith("waiting"):
            assert line, "it ended without waiting"
        going.set()
        _, stderr = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130 and "Run the same command again to resume." in stderr
    with Journal(tmp_path / "out.journal.jsonl") as journal:
        assert len(journal) == len(http.asked) < 200  # every answer that the server gave
    assert not (tmp_path / "out.jsonl").exists()
