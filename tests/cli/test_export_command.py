"""`tuna-peft export gguf` on a run's folder, a model and a stack."""

from __future__ import annotations

import pytest
from llama_family import write_model
from tiny_llama import SFT, write_stack
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.export.merge import merge_stack


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that looks like a run's: `stack/` and `merged/` inside."""
    folder = tmp_path_factory.mktemp("run")
    write_stack(folder / "stack", str(write_model(folder / "base", "llama")), "none", sft=SFT)
    merge_stack(folder / "stack", folder / "merged")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", "gguf", *map(str, arguments)])


def test_a_run_gives_its_merged_model_or_its_adapters(run, tmp_path):
    result = invoke(run, tmp_path / "out", "-t", "Q4_0", "-t", "f16", "--name", "mine")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"mine-Q4_0.gguf", "mine-F16.gguf", "Modelfile"}
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./mine-Q4_0.gguf\n")
    assert r"### Instruction:\n" in modelfile and r"\n\n### Response:" in modelfile
    result = invoke(run, tmp_path / "adapter", "--adapter", "--name", "mine")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "adapter" / "mine-LORA-F32.gguf").is_file()
    assert invoke(run / "base", tmp_path / "base").exit_code == 0


def test_files_of_a_run_are_measured_after_writing(run, tmp_path):
    (run / "divergence_prompts.json").write_text("[[1, 5, 9, 30], [1, 7, 8]]")
    try:
        result = invoke(run, tmp_path / "out", "-t", "q8_0", "-t", "f32")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.count("KL divergence from the stack: mean") == 3  # the base's, too
        assert "KL divergence" not in invoke(run, tmp_path / "out", "--no-check").stdout
        result = invoke(run, tmp_path / "out", "--base", "auto", "--name", "mine")
        assert result.exit_code == 0, result.stderr
        assert "mine-Q8_0.gguf, original base: KL divergence" in result.stdout
    finally:
        (run / "divergence_prompts.json").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/base", "{run}/out", "--upto", "sft"], "--upto needs a stack"),
        (["{run}", "{run}/out", "-t", "q3_k"], "unknown GGUF type 'q3_k'"),
        (["{run}/base", "{run}/out", "--prompts", "x.json"], "--prompts needs a run"),
        (["{run}", "{run}/out", "--base", "original"], "--base original cannot be used here"),
        (["{run}", "{run}/out", "--base", "auto"], "no prompts to choose a base with"),
        (["{run}/stack", "{run}/out", "-t", "f16", "-t", "f32"], "an adapter is written in one type"),
        (["{run}/absent", "{run}/out"], "no model here"),
        (["{run}/stack/sft", "{run}/out"], "one adapter of a stack"),
    ],
)
def test_mistakes_exit_with_2(run, arguments, message):
    result = invoke(*[argument.replace("{run}", str(run)) for argument in arguments])
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_without_the_package_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke(run, tmp_path / "out")
    assert result.exit_code == 2
    assert "pip install gguf" in result.stderr
