"""Saving and loading a stack, and errors for stacks that must not be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spies import Seen, spy
from tiny_llama import RANKING, SFT, load_tiny, stack_on, write_base

from tuna_peft.errors import UserError
from tuna_peft.models.base.load import load_base, make_quantization_config
from tuna_peft.models.stack import files as stack_files
from tuna_peft.models.stack.files import AdapterStack, save_stack
from tuna_peft.models.stack.manifest import read_manifest

TOKENS = torch.tensor([[1, 5, 9, 40]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_a_stack_comes_back_bitwise(base_path: str, tmp_path: Path, method: str) -> None:
    live = stack_on(load_tiny(base_path, method), sft=SFT, ranking=RANKING)
    save_stack(live, tmp_path / "stack", {"template": "alpaca"})
    stack = AdapterStack.from_pretrained(tmp_path / "stack", device="cpu")
    assert stack.names == ["sft", "ranking"]
    assert stack.prompt == {"template": "alpaca"}
    assert not any(parameter.requires_grad for parameter in stack.model.parameters())
    assert torch.equal(logits(stack.model), logits(live))
    stack.save(tmp_path / "again")
    assert (tmp_path / "again" / "stack.json").read_text() == (tmp_path / "stack" / "stack.json").read_text()


def test_the_folder_of_an_upper_adapter_says_what_is_missing(stack_path: Path) -> None:
    assert "`ranking` was trained on top of sft" in (stack_path / "ranking" / "README.md").read_text()
    assert not (stack_path / "sft" / "README.md").exists()  # which works on the base alone


def test_upto_loads_the_lower_part(base_path: str, stack_path: Path) -> None:
    stack = AdapterStack.from_pretrained(stack_path, upto="sft", device="cpu")
    assert stack.names == ["sft"]
    assert torch.equal(logits(stack.model), logits(stack_on(load_tiny(base_path), sft=SFT)))
    with pytest.raises(UserError, match="no adapter 'dpo'") as error:
        AdapterStack.from_pretrained(stack_path, upto="dpo")
    assert error.value.fix == "It has: sft, ranking."


def test_a_moved_base_is_accepted(base_path: str, stack_path: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base_path, tmp_path / "moved")
    stack = AdapterStack.from_pretrained(stack_path, base_model=str(moved), device="cpu")
    assert torch.equal(logits(stack.model), logits(AdapterStack.from_pretrained(stack_path, device="cpu").model))


@pytest.mark.parametrize("moved", [None, "elsewhere"])
def test_the_base_is_loaded_as_recorded_and_as_asked(
    stack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str | None
) -> None:
    folder = _edited(stack_path, tmp_path / "stack", lambda manifest: manifest["base"].update(revision="v9"))
    calls = spy(monkeypatch, stack_files, "load_base")
    asked = {"device": "cpu", "dtype": "bfloat16", "trust_remote_code": True}
    with pytest.raises(Seen):
        AdapterStack.from_pretrained(folder, base_model=moved, **asked)
    [((model,), options)] = calls
    config = options.pop("quantization_config")
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16
    assert model == (moved or read_manifest(folder).base["model"])
    assert options == {**asked, "revision": None if moved else "v9"}


def test_a_base_that_is_not_there_says_that_it_may_have_moved(stack_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="If the base of this stack has moved, pass its new path"):
        AdapterStack.from_pretrained(
            _edited(stack_path, tmp_path / "stack", lambda manifest: manifest["base"].update(model="/gone/away"))
        )


def test_another_base_is_refused(stack_path: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match=r"this stack was trained on .* the stored weights differ"):
        AdapterStack.from_pretrained(stack_path, base_model=other, device="cpu")
    with pytest.raises(UserError, match="this stack was trained on"):
        AdapterStack.from_pretrained(stack_path, base=load_tiny(other))


def test_a_given_base_must_be_quantised_as_in_training(base_path: str, stack_path: Path) -> None:
    AdapterStack.from_pretrained(stack_path, base=load_tiny(base_path))
    with pytest.raises(UserError, match=r"bnb_4bit_quant_type=nf4.*; the one given has no quantization"):
        AdapterStack.from_pretrained(stack_path, base=load_tiny(base_path, "none"))
    with pytest.raises(UserError, match="the one given has quantization .*bnb_4bit_use_double_quant=False"):
        AdapterStack.from_pretrained(stack_path, base=load_tiny(base_path, double_quant=False))


def test_the_dtype_of_training_is_recorded_and_kept(base_path: str, tmp_path: Path) -> None:
    config = make_quantization_config("nf4")
    live = stack_on(load_base(base_path, quantization_config=config, dtype="bfloat16", device="cpu"), sft=SFT)
    save_stack(live, tmp_path / "stack")
    assert read_manifest(tmp_path / "stack").load_dtype == "bfloat16"
    AdapterStack.from_pretrained(tmp_path / "stack", device="cpu", dtype="float32").save(tmp_path / "again")
    assert read_manifest(tmp_path / "again").load_dtype == "bfloat16"


def test_a_stack_of_an_earlier_version_has_no_dtype(stack_path: Path, tmp_path: Path) -> None:
    folder = _edited(stack_path, tmp_path / "stack", lambda manifest: manifest.pop("load_dtype"))
    assert AdapterStack.from_pretrained(folder, device="cpu").load_dtype is None


def test_an_adapter_without_its_stack_is_an_error(stack_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lone adapter") as error:
        AdapterStack.from_pretrained(stack_path / "ranking")
    assert error.value.fix == f"Its stack is {stack_path}: load that, up to 'ranking'."
    alone = shutil.copytree(stack_path / "ranking", tmp_path / "alone")
    with pytest.raises(UserError, match="lone adapter") as error:
        AdapterStack.from_pretrained(alone)
    assert "stack.json" in str(error.value.fix)
    with pytest.raises(UserError, match=r"no stack\.json here"):
        AdapterStack.from_pretrained(tmp_path)


def test_a_changed_adapter_is_refused(stack_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stack_path, tmp_path / "stack")
    weights = folder / "sft" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: value * 2 for key, value in tensors.items()}, weights)
    with pytest.raises(UserError, match="adapter 'sft' is not the one that was trained"):
        read_manifest(folder)
    folder = shutil.copytree(stack_path, tmp_path / "other")
    with open(folder / "sft" / "adapter_config.json", "a") as config:
        config.write(" ")
    with pytest.raises(UserError, match="adapter 'sft' is not the one that was trained"):
        read_manifest(folder)


def test_a_missing_part_is_refused(stack_path: Path, tmp_path: Path) -> None:
    for part in ("adapter_model.safetensors", "adapter_config.json"):
        folder = shutil.copytree(stack_path, tmp_path / part)
        (folder / "sft" / part).unlink()
        with pytest.raises(UserError, match="adapter 'sft' is missing"):
            read_manifest(folder)


def _edited(stack_path: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Copies the stack and applies `edit` to its manifest."""
    shutil.copytree(stack_path, folder)
    manifest = json.loads((folder / "stack.json").read_text())
    edit(manifest)
    (folder / "stack.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("path", ["../outside", "/etc", "sft/../../outside", "link"])
def test_a_path_that_leaves_the_folder_is_refused(stack_path: Path, tmp_path: Path, path: str) -> None:
    shutil.copytree(stack_path / "sft", tmp_path / "outside")
    folder = _edited(stack_path, tmp_path / "stack", lambda manifest: manifest["adapters"][0].update(path=path))
    (folder / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="leaves the stack's folder"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest.update(format=99), "stack format 99"),
        (lambda manifest: manifest.pop("quantization"), "not a valid stack manifest"),
        (lambda manifest: manifest.update(adapters=[{"name": "sft"}]), "not a valid stack manifest"),
        (lambda manifest: manifest["adapters"][0].update(path=3), "not a valid stack manifest"),
        (lambda manifest: manifest["base"].pop("fingerprint"), "not a valid stack manifest"),
    ],
)
def test_a_broken_manifest_is_refused(stack_path: Path, tmp_path: Path, edit: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_manifest(_edited(stack_path, tmp_path / "stack", edit))


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for content in ("{", "[]", "\xff"):
        (tmp_path / "stack.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="not a valid stack manifest"):
            read_manifest(tmp_path)
