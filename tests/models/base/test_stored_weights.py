"""The stored weights of a base: files that are missing, cut or something else; tensors that do not fit the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import load_tiny

from tuna_peft.errors import UserError
from tuna_peft.models.base import stored_weights
from tuna_peft.models.base.load import load_config_and_tokenizer
from tuna_peft.models.base.stored_weights import require_readable_weights, safetensors_files

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(base_path: str, tmp_path: Path) -> Path:
    """A base of one's own to damage."""
    return Path(shutil.copytree(base_path, tmp_path / "base"))


def replace_down(folder: Path, weight: torch.Tensor | None) -> None:
    """Replaces one stored tensor, or removes it."""
    stored = load_file(folder / WEIGHTS)
    del stored[DOWN]
    if weight is not None:
        stored[DOWN] = weight
    save_file(stored, folder / WEIGHTS, {"format": "pt"})


def test_a_whole_base_is_accepted_by_header_and_by_tensor(folder: Path) -> None:
    require_readable_weights(str(folder))
    assert load_tiny(str(folder), "nf4").identity["fingerprint"]


def test_what_is_not_in_the_cache_yet_is_not_checked() -> None:
    assert safetensors_files("nobody/has-this-model", "v9") == []
    require_readable_weights("nobody/has-this-model", "v9")


def test_a_download_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has the index and the first file: what it has is checked, and loading gets the rest."""
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.zeros(2)}, first)
    monkeypatch.setattr(stored_weights, "safetensors_files", lambda *_: [str(first), str(second)])
    require_readable_weights("org/model")
    first.write_text(LFS)
    with pytest.raises(UserError, match="1.safetensors: this is a pointer of Git LFS"):
        require_readable_weights("org/model")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (LFS.encode(), "this is a pointer of Git LFS, not the file\n.*git lfs pull"),
        (b"<!doctype html><html>", "this is a web page\n.*resolve"),
        (None, "not readable as weights of a model: .*not fully covered"),
    ],
)
def test_weights_that_are_something_else_or_cut_are_named_before_loading(
    folder: Path, content: bytes | None, error: str
) -> None:
    file = folder / WEIGHTS
    file.write_bytes(content or file.read_bytes()[:-1])
    for attempt in (require_readable_weights, lambda path: load_tiny(path, "none")):
        with pytest.raises(UserError, match=f"base/{WEIGHTS}: {error}"):
            attempt(str(folder))


def test_a_folder_without_safetensors_says_what_it_has(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no weights in safetensors\n.*Download"):
        require_readable_weights(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="in safetensors, only pytorch_model.bin\n.*save_pretrained"):
        require_readable_weights(str(folder))


def test_a_file_that_the_index_names_must_be_there(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="base/model-00002-of-00002.safetensors: .* it is missing"):
        require_readable_weights(str(folder))
    (folder / f"{WEIGHTS}.index.json").write_text("{")
    with pytest.raises(UserError, match="not readable as an index of weights"):
        require_readable_weights(str(folder))


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_a_missing_tensor_is_never_filled_with_random_numbers(folder: Path, method: str) -> None:
    replace_down(folder, None)
    with pytest.raises(UserError, match=f"the stored weights lack {DOWN}\n.*same model"):
        load_tiny(str(folder), method)


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_a_tensor_of_another_shape_is_refused(folder: Path, method: str) -> None:
    replace_down(folder, load_file(folder / WEIGHTS)[DOWN][:-1].contiguous())
    with pytest.raises(UserError, match=r"config.json says"):
        load_tiny(str(folder), method)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pointer_in_place_of_a_small_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS)
    with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS.*\n.*git lfs pull"):
        load_config_and_tokenizer(str(folder))
