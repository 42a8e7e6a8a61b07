"""`tuna-peft judge`, with servers on loopback and programs."""

from __future__ import annotations

import json
import sys

import pytest
from scripted_server import Answer, chat, scripted_server
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.cli.spending import confirm_spending
from tuna_peft.errors import UserError
from tuna_peft.feedback import local_model
from tuna_peft.feedback.settings import ServerSettings
from tuna_peft.feedback.spending import Estimate

KEY = "sk-secret-0123456789abcdef"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    rows = [{"id": i, "prompt": f"Prompt {i}?", "completions": ["short", "quite a bit longer"]} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**row, "ranks": [0, 1]}) + "\n" for row in rows))


def judge(*options, input=None):
    return CliRunner().invoke(app, ["judge", "data.jsonl", *map(str, options)], input=input)


def first_wins(asked):
    return chat('{"rank": [0, 1]}')


def test_a_server_ranks(tmp_path):
    with scripted_server(first_wins) as http:
        result = judge("out.jsonl", "--server", http.url, "--model", "m")
        assert result.exit_code == 0, result.stderr
        assert "4 questions to ask (0 are answered already); about" in result.stderr
        assert result.stdout.splitlines() == [
            "wrote out.jsonl: 4 of 4 prompts ranked",
            "  answers: 4 new, 0 from the journal; in total 400 tokens in, 80 out",
        ]
        before = (tmp_path / "out.jsonl").read_bytes()
        result = judge("out.jsonl", "--server", http.url, "--model", "m")
        assert "0 new, 4 from the journal" in result.stdout
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert len(http.asked) == 4
    written = [json.loads(line) for line in before.splitlines()]
    assert [row["id"] for row in written] == ["0", "1", "2", "3"] and written[0]["ranks"] == [0, 1]


@pytest.mark.parametrize("escaped", [False, True])
def test_a_key_in_a_good_answer_is_stored_nowhere(tmp_path, escaped):
    """A careless or hostile server repeats what it was sent; the answer itself stays usable."""
    answer = json.dumps({"own_response": f"My key is {KEY}.", KEY: 1, "rank": [0, 1]})
    body = chat(answer).body
    if escaped:
        body = body.replace(KEY.encode(), "".join(f"\\u{ord(char):04x}" for char in KEY).encode())
    with scripted_server(lambda asked: Answer(200, body)) as http:
        options = ["--server", http.url, "--model", "m", "--include-judge-answer", "reference"]
        result = judge("out.jsonl", *options)
    assert result.exit_code == 0, result.stderr
    assert "My key is [key]." in (tmp_path / "out.jsonl").read_text()
    for file in tmp_path.rglob("*"):
        assert KEY not in file.read_text(), file
    assert len(list(tmp_path.rglob("*"))) >= 3  # data, output and journal


def test_money_is_spent_only_with_a_yes(tmp_path):
    prices = ["--price-in", "1", "--price-out", "2"]
    with scripted_server(first_wins) as http:
        server = ["--server", http.url, "--model", "m"]
        result = judge("out.jsonl", *server, *prices)
        assert result.exit_code == 2 and "may cost money" in result.stderr and not http.asked
        assert "at most 0.02 in the prices' currency" in result.stderr
        assert judge("out.jsonl", *server, *prices, "--max-cost", "0.001", "--yes").exit_code == 2
        assert not http.asked
        result = judge("out.jsonl", *server, *prices, "--yes")
        assert result.exit_code == 0 and "cost 0.0006" in result.stdout
    result = judge("out.jsonl", "--server", "https://judge.invalid/v1", "--model", "other")
    assert result.exit_code == 2 and "(--price-in and --price-out)" in result.stderr


def test_nobody_can_be_asked_without_a_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    server = ServerSettings(base_url="https://judge.invalid/v1", model="m")
    with pytest.raises(UserError, match="no terminal to ask"):
        confirm_spending(Estimate(0, 1, 100, 10, None), server, yes=False)


def test_a_program_ranks(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text("def longer(record, response):\n    return len(response)\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = judge("out.jsonl", "--function", "my_judge:longer")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["completions"][0] == "quite a bit longer"
    del sys.modules["my_judge"]


@pytest.mark.parametrize("validate", [[], ["--validate"]])
def test_a_local_judge_is_loaded_as_the_options_say(monkeypatch, validate):
    asked = []

    def load_any_model(model, **options):
        asked.append((model, options))
        raise UserError("seen enough")

    monkeypatch.setattr(local_model, "load_any_model", load_any_model)
    options = ["--model", "m", "--device", "cpu", "--revision", "r", "--quantization", "nf4", "--trust-remote-code"]
    result = judge(f"out.json{'' if validate else 'l'}", *options, *validate)
    assert result.exit_code == 2 and "seen enough" in result.stderr
    loaded = {"device": "cpu", "revision": "r", "quantization": "nf4", "trust_remote_code": True}
    assert asked == [("m", loaded)]


def test_validation(tmp_path):
    with scripted_server(first_wins) as http:
        result = judge("report.json", "--server", http.url, "--model", "m", "--validate")
    assert result.exit_code == 0, result.stderr
    assert "position bias     1.000   (the response shown first wins 100% of these)" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["agreement"]["pairs"] == 4 and report["judge"]["asked"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["out.jsonl"], "give one of `server`, `model` and `function`"),
        (["out.jsonl", "--server", "http://localhost/v1"], "needs the name of its model"),
        (["out.json", "--function", "builtin:pico"], "end in .jsonl"),
        (["--function", "builtin:pico"], "the output file is missing"),
        (["out.jsonl", "--function", "os:sepp"], "no grader 'os:sepp'"),
        (["out.jsonl", "--function", "os:sep"], "sep is not a function"),
        (["out.jsonl", "--function", "__import__('os').system('touch pwned')"], "no grader"),
        (["out.jsonl", "--function", "my_judge;x:f"], "no grader"),
        (["out.jsonl", "--model", "m", "--include-judge-answer", "worst"], "include_judge_answer"),
        (["out.jsonl", "--server", "http://h/v1", "--model", "m", "--max-cost", "1"], "`max_cost` needs"),
        (["out.jsonl", "--server", f"http://{KEY}@h/v1", "--model", "m"], "a key belongs in an environment variable"),
        (["out.jsonl", "--server", KEY, "--model", "m"], "not an address like"),
        (
            ["out.jsonl", "--server", "http://h/v1", "--model", "m", "--api-key-env", KEY],
            "not the name of an environment",
        ),
    ],
)
def test_mistakes_exit_with_2(tmp_path, options, message):
    result = judge(*options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert KEY not in result.output
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out.jsonl").exists()
