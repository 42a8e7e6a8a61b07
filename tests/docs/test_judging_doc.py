"""The commands and the code of docs/judging.md run as they stand there, with a scripted server for any other."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from chain_llama import write_chain
from scripted_server import chat, scripted_server
from typer.testing import CliRunner

DOC = Path(__file__).parents[2] / "docs" / "judging.md"
TEXT = DOC.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_judge.py").write_text("def longer(record, response):\n    return len(response)\n")
    rows = [{"id": i, "prompt": f"Prompt {i}", "completions": ["one", "three", "four", "seven"]} for i in range(3)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = {"idx": 0, "instruction": "i", "input": "", "response1": "a", "response2": "bb", "annotator1": 2}
    (tmp_path / "pandalm_testset.jsonl").write_text(json.dumps(pair) + "\n")
    write_chain(tmp_path / "judge-model", "rank: [1, 0, 2, 3]")
    yield
    sys.modules.pop("my_judge", None)


def test_commands_run():
    from tuna_peft.cli.app import app

    lines = [line for block in blocks("sh") for line in block.splitlines()]
    with scripted_server(lambda asked: chat('{"rank": [3, 0, 2, 1]}')) as http:
        for line in lines:
            program, *arguments = shlex.split(re.sub(r"https?://\S+", http.url, line))
            assert program == "tuna-peft"
            result = CliRunner().invoke(app, arguments)
            if "--both-orders" in arguments:  # the model in its place looks at the order alone
                assert ("all tied: 3" in result.stderr) != ("3 of 3 prompts ranked" in result.stdout)
            else:
                assert result.exit_code == 0, f"{line}\n{result.output}"
    assert len(lines) == 5 and len(http.asked) == 3 + 3


def test_code_runs(capsys):
    [code] = blocks("python")
    exec(compile(code, str(DOC), "exec"), {})
    assert capsys.readouterr().out.startswith("['Blue is one.', 'Colour', 'Blue.']")
