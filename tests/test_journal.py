"""What is in a journal stays, whatever happens to the process that writes it."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tuna_peft.errors import UserError
from tuna_peft.journal import Journal, content_key

TEXTS = [
    "",
    "plain",
    "é, 日本語, 🐟, \u0301, \u200f\u202e",
    "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\ufeff",
    "\ud83d",
    "half \udc00 of a pair",
    '"quotes", \\ and \\n and {"key": "x", "value": 1}\n',
    "long " * 400_000,
]


def test_a_choice_is_made_once_and_is_no_answer(tmp_path):
    with Journal(tmp_path / "new.jsonl") as journal:
        assert journal.settle("dense", True, before=False) is True
        assert (list(journal), len(journal)) == ([], 0)
        journal.add("a", 1)
    with Journal(tmp_path / "new.jsonl") as journal:
        assert journal.settle("dense", False, before=False) is True  # a resumed run computes as it began
        assert journal.settle("later", 64, before=32) == 32  # the answers that are there were made without it
        assert list(journal) == ["a"]


def test_texts_survive_the_round_trip(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        for i, text in enumerate(TEXTS):
            journal.add(content_key(text=text, i=i), {"text": text})
    with Journal(tmp_path / "j.jsonl") as journal:
        assert [journal[key]["text"] for key in journal] == TEXTS
    assert (tmp_path / "j.jsonl").read_bytes().isascii()
    assert len((tmp_path / "j.jsonl").read_bytes().splitlines()) == len(TEXTS)


def test_keys_depend_on_content_and_not_on_order():
    assert content_key(a=1, b={"x": 1, "y": 2}) == content_key(b={"y": 2, "x": 1}, a=1)
    different = [{}, {"a": 1}, {"a": "1"}, {"a": 1.0}, {"a": [1]}, {"a": None}, {"b": 1}, {"a": "é"}, {"a": "e\u0301"}]
    assert len({content_key(**parts) for parts in different}) == len(different)
    with pytest.raises(ValueError):
        content_key(a=float("nan"))


def test_a_key_has_one_value_for_ever(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", 1)
        with pytest.raises(KeyError):
            journal.add("a", 2)
    with open(tmp_path / "j.jsonl", "a") as file:  # as if two writers had got there
        file.write(json.dumps({"key": "a", "value": 3}) + "\n")
    with Journal(tmp_path / "j.jsonl") as journal:
        assert (journal["a"], len(journal)) == (1, 1)


def test_values_are_copies(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", [1])
        journal["a"].append(2)
        assert journal["a"] == [1]


@pytest.mark.parametrize("cut", range(1, 44, 3))
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    file = tmp_path / "j.jsonl"
    with Journal(file) as journal:
        journal.add("first", "kept")
        journal.add("second", "torn ünd gone")
    whole = file.read_bytes()
    os.truncate(file, len(whole) - cut)
    with Journal(file) as journal:
        assert list(journal) == ["first"]
        journal.add("second", "torn ünd gone")
    assert file.read_bytes() == whole


def test_a_damaged_line_costs_itself_only(tmp_path, caplog):
    file = tmp_path / "j.jsonl"
    with Journal(file) as journal:
        for key in "abc":
            journal.add(key, key)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    with caplog.at_level(logging.WARNING), Journal(file) as journal:
        assert list(journal) == ["a", "c"]
        journal.add("b", "again")
        assert [journal[key] for key in "abc"] == ["a", "again", "c"]
    assert "1 lines are damaged (the first is line 2)" in caplog.text


@pytest.mark.parametrize(
    "content", [b'{"prompt": "x"}\n{"prompt": "y"}\n', b"no end", b'[{"key": 1}]\n', b"\xff\xfe\n"]
)
def test_another_file_is_left_alone(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="not a journal"):
        Journal(tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == content


def test_one_process_at_a_time(tmp_path):
    with Journal(tmp_path / "j.jsonl"):
        code = f"from tuna_peft.journal import Journal; Journal({str(tmp_path / 'j.jsonl')!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "in use by another process" in done.stderr
    Journal(tmp_path / "j.jsonl").close()


def test_a_journal_behind_a_link_is_locked_too(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "j.jsonl")
    with Journal(tmp_path / "link.jsonl") as journal, pytest.raises(UserError, match="in use by another process"):
        journal.add("a", 1)
        Journal(tmp_path / "j.jsonl")


def test_threads(tmp_path):
    def work(seed):
        for i in range(100):
            journal.add(f"{seed}-{i}", "x" * (i * seed))
            assert journal[f"{seed}-{i}"] == "x" * (i * seed)

    with Journal(tmp_path / "j.jsonl") as journal, ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))  # raises what a thread has raised
        assert len(journal) == 800
    with Journal(tmp_path / "j.jsonl") as journal:
        assert len(journal) == 800


def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path, monkeypatch):
    real = os.pwrite

    def full(file, data, offset):
        if len(data) > 5:
            return real(file, data[:5], offset)
        raise OSError(28, "No space left on device")

    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", 1)
        before = (tmp_path / "j.jsonl").read_bytes()
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="disk is full"):
            journal.add("b", "x" * 18)
        monkeypatch.undo()
        assert (tmp_path / "j.jsonl").read_bytes() == before
        journal.add("b", 2)
        assert journal["b"] == 2


def test_kill_9_in_the_middle_of_writing(tmp_path):
    code = (
        "import itertools\nfrom tuna_peft.journal import Journal\n"
        f"journal = Journal({str(tmp_path / 'j.jsonl')!r})\n"
        "for i in itertools.count(len(journal)): journal.add(str(i), 'x' * 5000); print(i, flush=True)\n"
    )
    draw = random.Random(0)
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(draw.randrange(5, 60)):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        last = int((writer.communicate()[0].splitlines() or [last])[-1])
        with Journal(tmp_path / "j.jsonl") as journal:
            keys = [int(key) for key in journal]
            assert keys == list(range(len(keys))) and len(keys) > last


def test_records_and_the_name_of_the_file_are_flushed_to_disk(tmp_path, monkeypatch):
    flushed = []

    def fsync(file):
        flushed.append((os.readlink(f"/proc/self/fd/{file}"), (tmp_path / "j.jsonl").read_bytes().count(b"\n")))

    monkeypatch.setattr(os, "fsync", fsync)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert flushed == [(str(tmp_path), 0)]  # a new file is lost with the list of names that it is missing from
        monkeypatch.setattr("tuna_peft.journal.SYNC_SECONDS", 1e9)
        journal.add("a", 1)
        assert len(flushed) == 1
        monkeypatch.setattr("tuna_peft.journal.SYNC_SECONDS", -1.0)
        journal.add("b", 2)
        monkeypatch.setattr("tuna_peft.journal.SYNC_SECONDS", 1e9)
        journal.add("c", 3)
    assert flushed[1:] == [(str(tmp_path / "j.jsonl"), 2), (str(tmp_path / "j.jsonl"), 3)]
