"""Finding a stack in a folder, in a run's folder, and in a snapshot of the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from tuna_peft.errors import UserError
from tuna_peft.models.stack import find as module
from tuna_peft.models.stack.any_model import load_any_model
from tuna_peft.models.stack.files import AdapterStack
from tuna_peft.models.stack.find import find_stack


def test_a_folder_and_the_folder_around_it(stack_path: Path, tmp_path: Path) -> None:
    assert find_stack(stack_path) == stack_path
    shutil.copytree(stack_path, tmp_path / "run" / "stack")
    assert find_stack(tmp_path / "run") == tmp_path / "run" / "stack"
    assert find_stack(tmp_path / "nothing" / "deep" / "down") == tmp_path / "nothing" / "deep" / "down"


def test_a_run_without_a_finished_stage(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: begun\n")
    for load in (AdapterStack.from_pretrained, load_any_model):
        with pytest.raises(UserError, match="no stage of this run has ended yet"):
            load(str(tmp_path))


def test_a_published_stack_is_found_below_its_combined_adapter(
    stack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    shutil.copytree(stack_path, published / "stack")
    shutil.copytree(stack_path / "sft", published, dirs_exist_ok=True)  # an adapter at the root
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(repo=repo, **options)
        files = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=options["allow_patterns"]):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / file).symlink_to(published / file)  # as the Hub's cache links to its blobs
        return str(tmp_path / "cache")

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    stack = AdapterStack.from_pretrained("someone/their-stack", revision="v2", device="cpu")
    assert stack.names == ["sft", "ranking"]
    assert (asked["repo"], asked["revision"]) == ("someone/their-stack", "v2")
    assert not (tmp_path / "cache" / "adapter_model.safetensors").exists()


def test_a_missing_repository() -> None:
    with pytest.raises(UserError, match="no such folder, and downloading it from the Hub failed"):
        find_stack("someone/not-in-the-cache")  # offline
