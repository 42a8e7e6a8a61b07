"""`tuna-peft sample` on a tiny stack."""

from __future__ import annotations

import json

import pytest
from scripted_server import Answer, scripted_server
from tiny_llama import write_base, write_stack
from typer.testing import CliRunner

from tuna_peft.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_stack(folder / "stack", write_base(folder / "base"))
    rows = [{"instruction": f"w{i} w{i + 1}", "input": "", "output": f"w{i}"} for i in range(3, 7)]
    (folder / "prompts.json").write_text(json.dumps(rows))
    return folder


def sample(folder, out, *options, model="."):
    arguments = ["sample", folder / model, folder / "prompts.json", out, "--max-new-tokens", "5", *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_samples_of_a_run(folder, tmp_path):
    out = tmp_path / "samples.jsonl"
    result = sample(folder, out, "--n", "3", "--seed", "4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote {out}: 12 responses to 4 of 4 prompts")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["prompt"].startswith("Below is an instruction")  # the template of training
    assert rows[0]["reference"] == "w3" and rows[0]["record"]["instruction"] == "w3 w4"
    assert [len(row["completions"]) for row in rows] == [3] * 4
    before = out.read_bytes()
    assert sample(folder, out, "--n", "3", "--seed", "4", "--batch-size", "1").exit_code == 0  # all in the journal
    assert out.read_bytes() == before
    other = sample(folder, tmp_path / "other.jsonl", "--n", "3", "--template", "none", "--upto", "sft")
    assert other.exit_code == 0
    assert json.loads((tmp_path / "other.jsonl").read_text().splitlines()[0])["prompt"] == "w3 w4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "batch_size: expected a number greater than 0 or 'auto', found '0'"),
        (["--top-p", "0"], "top_p: expected a number greater than 0"),
        (["--backend", "ollama"], "backend: expected 'transformers' or 'vllm'"),
        (["--template", "x"], "has no {instruction} in it"),
        (["--upto", "absent"], "no adapter 'absent'"),
        (["--format", "alpacka"], "format: expected"),
    ],
)
def test_mistakes_exit_with_2(folder, tmp_path, options, message):
    result = sample(folder, tmp_path / "out.jsonl", *options)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_the_output_is_jsonl(folder, tmp_path):
    result = sample(folder, tmp_path / "out.json")
    assert result.exit_code == 2 and "end in .jsonl" in result.stderr


def completion(asked):
    texts = [f"w{i + 3}" for i in range(asked.body.get("n", 1))]
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    return Answer(200, {"choices": choices})


def test_a_server_samples_without_the_model_being_loaded(folder, tmp_path, monkeypatch):
    from tuna_peft.run import samplers

    monkeypatch.setattr(samplers, "load_any_model", lambda *args, **options: pytest.fail("loaded"))
    out = tmp_path / "samples.jsonl"
    with scripted_server(completion) as server:
        options = ["--n", "3", "--server", server.url, "--model", "mine", "--in-flight", "1"]
        result = sample(folder, out, *options)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"wrote {out}: 12 responses to 4 of 4 prompts")
        before, asked = out.read_bytes(), len(server.asked)
        assert sample(folder, out, *options).exit_code == 0 and out.read_bytes() == before
        assert len(server.asked) == asked == 4  # all in the journal
        assert sample(folder, tmp_path / "b.jsonl", *options, "--upto", "sft").exit_code == 0
    body = server.asked[0].body
    assert body["model"] == "mine" and body["prompt"].startswith("Below is an instruction") and body["n"] == 3
    assert json.loads(before.splitlines()[0])["sampling"]["cut"] == [False] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "http://127.0.0.1:9/v1"], "a server needs the name of its model"),
        (["--model", "m"], "--model has no effect without --server"),
        (["--chat"], "--chat has no effect without --server"),
        (["--server", "http://127.0.0.1:9/v1", "--model", "m", "--backend", "vllm"], "no effect with `server`"),
        (["--server", "https://example.org/v1", "--model", "m"], "may cost money"),
        (["--server", "http://127.0.0.1:9/v1", "--model", "m", "--max-retries", "0"], "no connection"),
    ],
)
def test_mistakes_with_a_server_exit_with_2(folder, tmp_path, options, message):
    result = sample(folder, tmp_path / "out.jsonl", *options)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
