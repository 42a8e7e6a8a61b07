"""The commands and the code of docs/export.md run as they stand there, on a tiny stack in the place of a run's."""

import json
import re
import shlex
from pathlib import Path

from tiny_llama import SFT, write_base, write_stack
from typer.testing import CliRunner

DOC = Path(__file__).parents[2] / "docs" / "export.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def test_commands_and_code_run(tmp_path, monkeypatch):
    from tuna_peft.cli.app import app

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    write_stack(run / "stack", write_base(tmp_path / "base"), probabilistic={**SFT, "r": 20}, contextual=SFT)
    (run / "divergence_prompts.json").write_text(json.dumps([[5, 9, 4], [7, 8]]))
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    for program, *arguments in commands:
        assert program == "tuna-peft"
        if "--compare" in arguments:  # tests/cli/test_merge_and_generate.py
            continue
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}"
        assert ("KL" in result.stdout) is ("--no-check" not in arguments)
    assert {arguments[1] for arguments in commands} == {"combine", "merge", "divergence"}
    [code] = blocks("python")
    names: dict = {}
    exec(compile(code, str(DOC), "exec"), names)
    assert names["stack"].names == ["probabilistic"]
