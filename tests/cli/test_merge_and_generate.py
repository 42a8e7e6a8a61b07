"""`combine`, `merge` and `generate` on a tiny stack."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
from rounding import stack_kl_bound
from tiny_llama import write_base, write_stack
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.cli.generate import _instructions, _read
from tuna_peft.data.config import PromptConfig
from tuna_peft.errors import UserError

DTYPES = ("bfloat16", "float16", "float32", "nf4", "int8")
GGUF = ("GGUF f16", "GGUF q8_0", "GGUF q4_0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that looks like a run's: `stack/` inside."""
    folder = tmp_path_factory.mktemp("run")
    write_stack(folder / "stack", write_base(folder / "base"))
    return folder


def invoke(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def test_merge_measures_its_distance_from_the_stack(run, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(3, 9)))
    result = invoke("merge", run, tmp_path / "merged", "--prompts", data)
    assert result.exit_code == 0, result.stderr
    measured = dict(re.findall(r"^(.*): KL divergence from the stack: mean (\S+),", result.stdout, re.MULTILINE))
    assert measured.keys() == {"base without adapters", str(tmp_path / "merged")}
    mean = float(measured[str(tmp_path / "merged")])
    assert 0 <= mean < 1e-2  # weights rounded to bf16, computed in fp32: the same everywhere
    unmeasured = invoke("merge", run, tmp_path / "again", "--prompts", data, "--no-check")
    assert "KL divergence" not in unmeasured.stdout
    later = invoke("divergence", run, tmp_path / "merged", tmp_path / "again", "--prompts", data)
    assert later.exit_code == 0, later.stderr
    *_, base, line = result.stdout.splitlines()
    assert later.stdout.splitlines() == [base, line, line.replace("merged", "again")]


def test_combine_says_what_a_smaller_rank_costs(run, tmp_path):
    result = invoke("combine", run, tmp_path / "combined")
    assert result.exit_code == 0, result.stderr
    assert "sft + ranking as one adapter of rank 12 on 10 modules" in result.stdout
    prompts = [[5, 9, 4, 7], [8, 3]]
    (run / "divergence_prompts.json").write_text(json.dumps(prompts))
    result = invoke("combine", run, tmp_path / "small", "--rank", 4)
    (run / "divergence_prompts.json").unlink()
    assert result.exit_code == 0, result.stderr
    assert "of rank 4 on" in result.stdout
    assert re.search(r"changed the update of a module by [\d.]+% on average, [\d.]+% at most", result.stdout)
    assert re.search(r"KL divergence from the stack: mean \S+, .* of 6 tokens", result.stdout)


def test_merge_to_nf4_prints_how_much_of_the_update_is_kept(run, tmp_path):
    result = invoke("merge", run, tmp_path / "merged", "--dtype", "nf4", "--allow-lost-update")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"rounding to nf4: [\d.]+% of the update is kept; [\d.]+% in the worst module", result.stdout)


def test_compare_measures_every_route_and_keeps_the_one_asked_for(run, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(3, 9)))
    result = invoke("merge", run, tmp_path / "merged", "--compare", "--prompts", data)
    assert result.exit_code == 0, result.stderr
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines() if "│" in line
    ]
    assert [row[0] for row in rows] == [
        "base without adapters",
        "adapter, rank 12",
        "adapter, rank 6",
        "adapter, unquantized base",
        "adapter with its base",
        *(f"{base}, {kind}" for base in ("dequantized", "original") for kind in (*DTYPES, *GGUF)),
    ]
    mean = {row[0]: float(row[3]) for row in rows if "GGUF" not in row[0]}
    assert all(row[3] == "not possible" for row in rows if "GGUF" in row[0])
    assert "llama.cpp cannot repeat this tokenizer" in result.stderr
    exact = ("adapter, rank 12", "adapter with its base", "dequantized, float32")
    assert max(mean[name] for name in exact) <= stack_kl_bound(run / "stack")
    # The adapter on the original base and the model merged into it are the same function.
    assert mean["adapter, unquantized base"] == pytest.approx(mean["original, float32"], rel=0.05)
    assert mean["dequantized, float32"] < mean["dequantized, float16"] < mean["dequantized, bfloat16"]
    assert mean["dequantized, bfloat16"] < mean["original, float32"]
    assert mean["adapter, rank 6"] < mean["base without adapters"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "prompts.jsonl"]


def test_merge_a_run_and_generate_from_stack_and_merged_model(run, tmp_path):
    merged = tmp_path / "merged"
    result = invoke("merge", run, merged, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert f"wrote {merged}: sft + ranking merged into the dequantized base, float32" in result.stdout

    question = ["w3 w4 w5", "--input", "w6", "--max-new-tokens", "5", "--template", "{instruction} {input}"]
    from_stack = invoke("generate", run, *question)
    assert from_stack.exit_code == 0, from_stack.stderr
    assert 1 <= len(from_stack.stdout.split()) <= 5
    assert invoke("generate", run / "stack", *question).stdout == from_stack.stdout
    assert invoke("generate", merged, *question).stdout == from_stack.stdout
    # The template of training is recorded with both.
    assert invoke("generate", merged, "w3").stdout == invoke("generate", run, "w3").stdout


def test_prompts_come_from_standard_input_one_a_line(run):
    options = ["--max-new-tokens", "3", "--template", "none", "--upto", "sft"]
    piped = invoke("generate", run, *options, input="w3 w4\n\nw5\n")
    assert piped.exit_code == 0
    assert len(piped.stdout.splitlines()) == 2


QUESTION = ["--max-new-tokens", "5", "--template", "{instruction} "]


def test_a_streamed_response_is_the_same(run):
    whole = invoke("generate", run, "w3 w4", *QUESTION)
    assert whole.exit_code == 0 and invoke("generate", run, "w3 w4", *QUESTION, "--stream").stdout == whole.stdout


def test_samples_depend_on_the_seed_only(run):
    drawn = ["generate", run, "w3 w4", *QUESTION, "--n", "3", "--temperature", "1.5", "--top-p", "0.9"]
    first, again, other = (invoke(*drawn, "--seed", seed).stdout for seed in (0, 0, 1))
    assert first == again != other and len(first.splitlines()) == 3


def test_a_file_of_prompts_gives_json_lines_in_its_order(run, tmp_path):
    prompts = ["w3", "w4 w5 w6", "w7 w8"]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{one} "}) + "\n" for one in prompts))
    for name in ("p.txt", "p.jsonl"):
        result = invoke("generate", run, *QUESTION, "--prompts", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert [one["prompt"] for one in answers] == [f"{one} " for one in prompts]
        alone = [invoke("generate", run, one, *QUESTION).stdout.rstrip("\n") for one in prompts]
        assert [one["responses"] for one in answers] == [[text] for text in alone]


def test_a_pipe_gets_no_carriage_returns(run, tmp_path):
    command = [sys.executable, "-m", "tuna_peft", "merge", str(run), str(tmp_path / "merged"), "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"\r" not in done.stdout + done.stderr  # libraries draw bars while they load weights


def test_at_a_terminal_it_says_what_it_waits_for(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("w3 w4\n\n"))
    assert list(_instructions(None)) == ["w3 w4"]
    assert "Ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{run}/absent", "x"], "neither a folder here nor a Hub id"),
        (["generate", "{run}", "x", "--upto", "absent"], "no adapter 'absent'"),
        (["generate", "{run}/base", "x", "--upto", "sft"], "upto` goes with a stack"),
        (["generate", "{run}/stack/ranking", "x"], "lone adapter"),
        (["generate", "{run}", "x", "--template", "nothing"], "has no {instruction} in it"),
        (["generate", "{run}", "x", "--n", "2"], "2 greedy responses would be equal"),
        (["generate", "{run}", "x", "--n", "2", "--temperature", "1", "--stream"], "one response at a time"),
        (["generate", "{run}", "x", "--prompts", "absent.txt"], "not both"),
        (["generate", "{run}", "--prompts", "absent.txt"], "no such file"),
        (["generate", "{run}", "x", "--top-p", "0"], "top_p"),
        (["merge", "{run}", "{run}/merged", "--dtype", "int4"], "int4"),
        (["merge", "{run}/base", "{run}/merged"], "stack.json"),
        (["merge", "{run}", "{run}/merged", "--compare"], "--compare needs prompts"),
        (["divergence", "{run}", "{run}/merged"], "no prompts to compare on"),
        (["combine", "{run}/base", "{run}/combined"], "stack.json"),
        (["combine", "{run}", "{run}/combined", "--prompts", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_mistakes_exit_with_2(run, arguments, message):
    result = invoke(*[argument.replace("{run}", str(run)) for argument in arguments])
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_prompts_that_are_not_utf_8_are_named_with_their_place(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"one\nhi \xff\n")
    with pytest.raises(UserError, match="byte 0xff at byte 7, line 2"):
        _read(file, PromptConfig())
