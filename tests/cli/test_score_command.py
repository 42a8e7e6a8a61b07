"""`tuna-peft score`: one teacher, and what the others' options make of it."""

from __future__ import annotations

import json

import pytest
from tiny_llama import write_base, write_stack
from typer.testing import CliRunner

from tuna_peft.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_stack(folder / "stack", write_base(folder / "base"))
    rows = [{"prompt": f"w{i} w7 ", "completions": ["w5", "w6 w8 w4"], "logprobs": [-1.0, -2.0]} for i in range(3, 6)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def score(folder, out, *options):
    arguments = ["score", folder / "samples.jsonl", out, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_stack_as_teacher(folder, tmp_path):
    out = tmp_path / "scored.jsonl"
    result = score(folder, out, "--model", folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"wrote {out}: 6 responses to 3 of 3 prompts, ranked\n"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["teacher"]["adapters"] == ["sft", "ranking"]
    again = CliRunner().invoke(app, ["data", "inspect", str(out)])
    assert again.exit_code == 0, again.stderr


def test_recorded_log_probabilities(folder, tmp_path):
    out = tmp_path / "scored.jsonl"
    columns = ["--column", "prompt=prompt", "--column", "completions=completions"]
    result = score(folder, out, "--logprobs", "logprobs", "--tokenizer", folder / "base", *columns)
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text().splitlines()[0])["lengths"] == [3, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one teacher: --model, --server or --logprobs, not none"),
        (["--model", "x", "--logprobs", "y"], "not --model and --logprobs"),
        (["--server", "http://h/v1", "--model", "m", "--logprobs", "y"], "not --server and --logprobs"),
        (["--logprobs", "logprobs"], "--logprobs needs to know where the responses are"),
        (["--model", "{run}", "--generate"], "`generate` has no effect with `model`"),
        (["--model", "{run}", "--quantization", "int4"], "quantization: expected 'none'"),
        (["--server", "http://localhost:9/v1"], "needs the name of its model"),
        (["--server", "localhost", "--model", "m"], "not an address like https://host/v1"),
        (["--model", "{run}/absent"], "neither a folder here nor a Hub id"),
        (["--model", "{run}", "--template", "x"], "has no {instruction} in it"),
    ],
)
def test_mistakes_exit_with_2(folder, tmp_path, options, message):
    result = score(folder, tmp_path / "out.jsonl", *[option.replace("{run}", str(folder)) for option in options])
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
