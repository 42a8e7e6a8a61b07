"""Publishing with the real `huggingface_hub` client against a Hub on this machine, and loading back from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN, WRITE_TOKEN, Hub, client_of_its_own
from huggingface_hub import ModelCard
from node_llama_cpp import IS_INSTALLED, ask
from peft import PeftModel
from rounding import assert_rounded, operations_of
from tiny_llama import PROMPTS, RANKING, SFT, Tiny, load_tiny, stack_on
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.errors import UserError
from tuna_peft.export import hub as hub_module
from tuna_peft.export.divergence import iter_logits
from tuna_peft.export.gguf.model import export_gguf
from tuna_peft.export.hub import push
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.release import Kind, collect_release
from tuna_peft.models.stack.files import AdapterStack, save_stack

BASE_ID = "someone/tiny-llama"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with client_of_its_own(monkeypatch, tmp_path) as server:
        yield server


def test_a_stack_is_published_private_in_one_commit(tiny: Tiny, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    report = push(tiny.stack, "me/adapters", base_id=BASE_ID)
    repository = hub.repositories["me/adapters"]
    assert repository.private
    assert hub.requests["commit"] == 1
    assert report.commit == repository.branches["main"]
    files = repository.files()
    assert (
        set(files)
        == set(report.files)
        == {
            "README.md",
            *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
            *(
                f"{folder}{name}"
                for folder in ("", "stack/sft/", "stack/ranking/")
                for name in ("adapter_config.json", "adapter_model.safetensors")
            ),
            "stack/stack.json",
            "stack/ranking/README.md",
        }
    )
    assert report.files == {path: len(content) for path, content in files.items()}
    everything = b"".join(files.values()) + capsys.readouterr().out.encode()
    for secret in (tiny.base, str(tiny.stack), WRITE_TOKEN):
        assert secret.encode() not in everything
    assert ModelCard(files["README.md"].decode()).data.base_model == BASE_ID
    # Nothing has changed: nothing is sent, and no commit made.
    sent = hub.sent
    assert push(tiny.stack, "me/adapters", base_id=BASE_ID).commit == report.commit
    assert hub.sent == sent
    assert hub.requests["commit"] == 1


def as_a_stranger(hub: Hub, command: list[str], folder: Path) -> None:
    """Runs a Python command in a process of its own, which knows the Hub by its environment only and may read."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"), "HF_TOKEN": READ_TOKEN,
    }  # fmt: skip
    done = subprocess.run([sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_what_is_published_loads_back_to_the_same_logits(tiny: Tiny, hub: Hub, tmp_path: Path) -> None:
    push(tiny.stack, "me/adapters", base_id=BASE_ID)
    merge_stack(tiny.stack, tmp_path / "merged", dtype="float32")
    push(tmp_path / "merged", "me/merged", base_id=BASE_ID)
    download = "from huggingface_hub import snapshot_download\n" + "".join(
        f"snapshot_download('me/{name}', local_dir='{name}')\n" for name in ("adapters", "merged")
    )
    (tmp_path / "stranger").mkdir()
    as_a_stranger(hub, ["-c", download], tmp_path / "stranger")
    adapters, merged = tmp_path / "stranger" / "adapters", tmp_path / "stranger" / "merged"
    live = AdapterStack.from_pretrained(tiny.stack, device="cpu").model
    found = {
        "stack": AdapterStack.from_pretrained(adapters, base_model=tiny.base, device="cpu").model,
        "combined": PeftModel.from_pretrained(load_tiny(tiny.base).model, str(adapters)).eval(),
        "merged": AutoModelForCausalLM.from_pretrained(merged).eval(),
    }
    batches = [torch.tensor([prompt]) for prompt in PROMPTS]
    expected = list(iter_logits(live, batches))
    for name, model in found.items():
        for logits, other in zip(expected, iter_logits(model, batches), strict=True):
            assert_rounded(other, logits, 0 if name == "stack" else operations_of(live), name=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "merged", "gguf"])
def test_the_snippets_of_the_card_run_as_they_stand(hub: Hub, tmp_path: Path, kind: Kind) -> None:
    """All but vLLM and Ollama; in place of `llama-cli` the library of llama.cpp, where it is installed."""
    base = load_tiny("builtin:pico-llama")
    save_stack(stack_on(base, sft=SFT, ranking=RANKING), tmp_path / "stack", {"template": "alpaca"})
    source = tmp_path / "stack"
    if kind != "adapters":
        merge_stack(source, tmp_path / "trained")
        source = tmp_path / "trained"
    if kind == "gguf":
        export_gguf(source, tmp_path / "files", types=["q8_0"])
        source = tmp_path / "files"
    push(source, "me/pico")
    card = hub.repositories["me/pico"].files()["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == {"adapters": 2, "merged": 1, "gguf": 0}[kind]
    for block in blocks:
        as_a_stranger(hub, ["-c", block], tmp_path)
    programs = {"hf": "huggingface_hub.cli.hf", "tuna-peft": "tuna_peft"}
    lines = [line.split() for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL) for line in block.splitlines()]
    for program, *arguments in lines:
        if program in programs:
            as_a_stranger(hub, ["-m", programs[program], *arguments], tmp_path)
    runs = [arguments for program, *arguments in lines if program == "llama-cli"]
    assert len(runs) == (2 if kind == "adapters" else 1)
    for run in runs:
        given = dict(zip(run[::2], run[1::2], strict=True))
        model, lora = tmp_path / given.pop("-m"), given.pop("--lora", None)
        assert not given and model.is_file() and (lora is None or (tmp_path / lora).is_file())
        if IS_INSTALLED:
            [logits] = ask(model, [[1, 2, 3]], lora=lora and tmp_path / lora).logits
            assert logits.isfinite().all()


@pytest.mark.parametrize("base_is_there", [True, False])
def test_adapters_bring_the_prompt_of_training(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, base_is_there: bool
) -> None:
    stack = tmp_path / "stack"
    shutil.copytree(tiny.stack, stack)
    if not base_is_there:
        manifest = (stack / "stack.json").read_text()
        (stack / "stack.json").write_text(manifest.replace(tiny.base, str(tmp_path / "moved")))
    (tmp_path / "work").mkdir()
    release = collect_release(stack, tmp_path / "work", base_id=BASE_ID)
    assert ("tokenizer_config.json" in release.files) == base_is_there
    assert ("no tokenizer beside the adapter" in caplog.text) != base_is_there
    if base_is_there:
        merge_stack(tiny.stack, tmp_path / "merged")
        expected = (tmp_path / "merged" / "chat_template.jinja").read_bytes()
        template = release.files["chat_template.jinja"]
        assert isinstance(template, Path) and template.read_bytes() == expected
    for name, upper in (("stack/sft", False), ("stack/ranking", True), ("", False)):
        content = release.files[f"{name}/adapter_config.json".lstrip("/")]
        base = json.loads(content if isinstance(content, bytes) else content.read_bytes())["base_model_name_or_path"]
        assert base == ("(this adapter needs the adapters below it, sft: see its README.md)" if upper else BASE_ID)


def test_an_interrupted_upload_goes_on_where_it_stopped(tiny: Tiny, hub: Hub) -> None:
    hub.faults["upload"] = [None, *["drop"] * 40]
    with pytest.raises(UserError, match="the connection to the Hub broke.*\n.*not sent again"):
        push(tiny.stack, "me/adapters", base_id=BASE_ID)
    first = hub.sent
    repository = hub.repositories["me/adapters"]
    assert first > 0
    assert repository.files() == {}  # nothing is half there
    hub.faults.clear()
    hub.faults["commit"] = [503]
    with pytest.raises(UserError, match=r"server error \(HTTP 503\)\n.*not sent again"):
        push(tiny.stack, "me/adapters", base_id=BASE_ID)
    large = sum(tensors.stat().st_size for tensors in tiny.stack.rglob("*.safetensors"))
    assert first < large < hub.sent  # the combined adapter as well
    sent = hub.sent
    push(tiny.stack, "me/adapters", base_id=BASE_ID)
    assert (
        hub.sent
        == sent
        == sum(len(content) for path, content in repository.files().items() if path.endswith(".safetensors"))
    )


def test_dropped_connections_and_errors_of_the_server_are_retried(tiny: Tiny, hub: Hub) -> None:
    hub.faults["upload"] = ["drop", 500]
    hub.faults["preupload"] = [502]
    hub.faults["batch"] = [503]
    push(tiny.stack, "me/adapters", base_id=BASE_ID)
    assert len(hub.repositories["me/adapters"].files()) == 12


@pytest.mark.parametrize(
    ("route", "fault", "message"),
    [
        ("upload", "drop", "the connection to the Hub broke.*\n.*not sent again"),
        ("create", 401, "does not accept the token\n.*hf auth login"),
        ("create", 403, "may not write there"),
        ("create", "drop", "the connection to the Hub broke"),
        ("preupload", 403, "may not write there"),
        ("commit", 409, "somebody else changed"),
        ("commit", 412, "somebody else changed"),
        ("commit", 422, "the Hub rejects the request"),
    ],
)
def test_refusals_say_what_to_do(tiny: Tiny, hub: Hub, route: str, fault: int | str, message: str) -> None:
    hub.faults[route] = [fault] * 40
    with pytest.raises(UserError, match=message) as error:
        push(tiny.stack, "me/adapters", base_id=BASE_ID)
    assert WRITE_TOKEN not in str(error.value)
    assert [file for repository in hub.repositories.values() for file in repository.files()] == []


def test_tokens_come_from_the_environment_or_the_hubs_store(
    tiny: Tiny, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(UserError, match="may not write there"):
        push(tiny.stack, "me/x", base_id=BASE_ID)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="does not accept the token"):
        push(tiny.stack, "me/x", base_id=BASE_ID)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token for the Hub\n.*hf auth login"):
        push(tiny.stack, "me/x", base_id=BASE_ID)
    (tmp_path / "no-token").write_text(WRITE_TOKEN)
    assert push(tiny.stack, "x", base_id=BASE_ID).repo_id == "me/x"


def test_a_public_repository_is_asked_for_by_name(tiny: Tiny, hub: Hub) -> None:
    push(tiny.stack, "me/public", base_id=BASE_ID, private=False)
    assert not hub.repositories["me/public"].private
    with pytest.raises(UserError, match="exists and is public\n.*--public"):
        push(tiny.stack, "me/public", base_id=BASE_ID)


def test_branches_and_pull_requests(tiny: Tiny, hub: Hub) -> None:
    push(tiny.stack, "me/x", base_id=BASE_ID, revision="v1/rc")
    repository = hub.repositories["me/x"]
    assert repository.files("main") == {}
    assert len(repository.files("v1/rc")) == 12
    report = push(tiny.stack, "me/x", base_id=BASE_ID, create_pr=True)
    assert "/discussions/" in str(report.url)
    assert repository.files("main") == {}
    with pytest.raises(UserError, match="goes to the main branch"):
        push(tiny.stack, "me/x", base_id=BASE_ID, create_pr=True, revision="v1")


def test_a_dry_run_needs_neither_network_nor_token(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "HfApi", None)
    monkeypatch.setattr(hub_module, "require_token", None)
    result = CliRunner().invoke(app, ["push", str(tiny.stack), "me/x", "--base-id", BASE_ID, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^ +[\d,]+  stack/ranking/adapter_model.safetensors$", result.stdout, re.MULTILINE)
    assert "12 files" in result.stdout
    assert "would be uploaded to private me/x; nothing was uploaded" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{stack}", "me/x"], "the adapters' base is a folder of this machine.*\n.*--base-id"),
        (["{stack}", "no good/name", "--base-id", BASE_ID], "cannot name a repository"),
        (["{stack}", "me/x", "--what", "everything"], "'everything' cannot be published"),
        (["{stack}/sft", "me/x"], "nothing here that can be published"),
        (["{stack}", "me/x", "--what", "merged"], "this is adapters, not merged"),
    ],
)
def test_mistakes_exit_with_2(tiny: Tiny, arguments: list[str], message: str) -> None:
    stack = str(tiny.stack)
    result = CliRunner().invoke(app, ["push", *(part.replace("{stack}", stack) for part in arguments), "--dry-run"])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr)


def test_changed_weights_are_not_published(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.stack, tmp_path / "stack")
    (tmp_path / "stack" / "sft" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="its hash differs"):
        push(tmp_path / "stack", "me/x", base_id=BASE_ID, dry_run=True)
