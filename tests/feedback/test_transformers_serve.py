"""Against a server that is not ours: `transformers serve` on loopback."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from chain_llama import write_chain
from honest_judge import rows

from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.feedback.judge import Judging, judge_rows
from tuna_peft.feedback.server import Server, choices, message_text
from tuna_peft.feedback.settings import JudgeSettings, ServerSettings
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import load_base, resolve_model_path
from tuna_peft.models.generation.generate import generate_responses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="needs transformers[serving]"),
]
LIMIT = 300.0


@contextlib.contextmanager
def transformers_serve(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", model]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        began = time.monotonic()
        while True:
            assert process.poll() is None and time.monotonic() - began < LIMIT, "transformers serve did not start"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        yield ServerSettings(base_url=f"http://127.0.0.1:{port}/v1", model=model, in_flight=2, timeout=LIMIT)
    finally:
        process.terminate()
        process.wait()


def test_pico_llama_as_server(tmp_path):
    path = resolve_model_path("builtin:pico-llama")
    base = load_base(path, device="cpu")
    hello = [{"role": "user", "content": "Which of these are fruits?\n\napple, dog, pear"}]
    with transformers_serve(path) as settings:
        server = Server(settings)
        reply = server.chat(hello, max_tokens=20, temperature=0.0)
        ids = prompt_ids(hello, base.tokenizer)
        [expected] = generate_responses(base.model, base.tokenizer, [ids], max_new_tokens=20)
        assert message_text(reply)[0].strip() == expected
        assert reply.usage.tokens_in == len(ids)
        [choice] = choices(server.complete("Sort: b a", max_tokens=5, temperature=0.0))
        assert isinstance(choice["text"], str)
        # It is no judge, and is not taken for one.
        judge = JudgeSettings(server=settings, max_tokens=16, attempts=2)
        with pytest.raises(UserError, match="ranked none of 4 prompts \\(unreadable: 4\\)"):
            judge_rows(rows(4), judge, tmp_path / "j.jsonl")
        with Journal(tmp_path / "j.jsonl") as journal:
            assert len(journal) == 4 and all(journal[key]["usage"][0] > 1000 for key in journal)
        with pytest.raises(UserError, match="in a row have failed.*requested 'other'"):
            other = settings.model_copy(update={"model": "other"})
            judge_rows(rows(9), JudgeSettings(server=other), tmp_path / "j.jsonl")


def test_a_judge_behind_it(tmp_path):
    model = write_chain(tmp_path / "judge", "rank: [2, 3, 1, 0]")
    with transformers_serve(model) as settings:
        judge = JudgeSettings(server=settings, max_tokens=16)
        records, report = judge_rows(rows(6), judge, tmp_path / "j.jsonl")
        with Journal(tmp_path / "j.jsonl") as journal:
            questions = Judging(rows(6), judge, journal).questions.values()
    assert report.ranked == 6 and report.tokens_out > 0
    for record, question in zip(records, questions, strict=True):
        assert record["completions"] == [question.responses[i] for i in (2, 3, 1, 0)]
    local, _ = judge_rows(rows(6), JudgeSettings(model=model, max_tokens=16), tmp_path / "local.jsonl")
    assert local == records
