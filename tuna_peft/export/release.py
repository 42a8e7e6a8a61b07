"""Collects the files to publish: adapters, merged model or GGUF files, without local paths. `hub` calls it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tuna_peft.errors import UserError
from tuna_peft.export.base_files import companion_files, copy_tokenizer
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.output import RECORD
from tuna_peft.json_text import read_json
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.models.stack.adapters import UPPER_BASE
from tuna_peft.models.stack.manifest import ADAPTER_FILES, MANIFEST, read_manifest

Kind = Literal["adapters", "merged", "gguf"]
KINDS: tuple[Kind, ...] = ("adapters", "merged", "gguf")
_KIND_OF_EXPORT: dict[str, Kind] = {"merged": "merged", "gguf": "gguf", "gguf-adapter": "gguf"}
_NOT_PUBLISHED = (RECORD, "README.md")


@dataclass
class Release:
    """The files to publish, and the recipe and results behind them.

    Attributes:
        kind: Adapters, a merged model or GGUF files.
        files: Local files, or contents, by their path in the repository.
        stack: The stack's manifest as a dictionary, with the base's name on the Hub.
        base: The base's Hub id or `builtin:` name; None for a local model without one.
        recipe: The run's recipe without local paths; None without a run.
        report: The run's `report.json`; empty without one.
        export: The export's own record (`tuna_export.json`); empty for adapters.
    """

    kind: Kind
    files: dict[str, Path | bytes]
    stack: dict[str, Any]
    base: str | None
    recipe: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether weights in the files have fewer than 16 bits, unlike in the model that was evaluated."""
        return self.export.get("dtype") in ("nf4", "int8") or any(
            type not in ("f32", "f16", "bf16") for type in self.export.get("types", ())
        )

    @property
    def relation(self) -> str:
        """The relation to the base in the Hub's terms: `adapter`, `finetune` or `quantized`."""
        if self.kind == "adapters" or self.export.get("kind") == "gguf-adapter":
            return "adapter"
        # A GGUF file is a quantization of the merged model, and that is a fine-tune of the base.
        return "quantized" if self.export.get("dtype") in ("nf4", "int8") else "finetune"

    @property
    def revision(self) -> str | None:
        """The base's commit hash."""
        return self.stack["base"]["revision"]

    @property
    def stages(self) -> list[str]:
        """Names of the adapters from bottom to top."""
        return [entry["name"] for entry in self.stack["adapters"]]

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def collect_release(
    source: str | os.PathLike[str], workdir: Path, *, kind: Kind | None = None, base_id: str | None = None
) -> Release:
    """Finds the files to publish.

    Args:
        source: A run's folder, a stack, a merged model, or a folder of GGUF files.
        workdir: An empty folder for files that must be made first; keep it until the release is published.
        kind: What to publish of a run; by default its adapters.
        base_id: The base's Hub id, if the stack was trained on a local copy.

    Raises:
        UserError: Nothing to publish there, or adapters on a local base without a Hub id.
    """
    folder = Path(source)
    run = next((path for path in (folder, folder.parent) if _is_run(path)), None)
    if folder == run:
        kind = kind or "adapters"
        folder = run / {"adapters": "stack", "merged": "merged", "gguf": "gguf"}[kind]
        if not folder.is_dir():
            make = "tuna-peft merge" if kind == "merged" else "tuna-peft export gguf"
            raise UserError(f"the run has no {folder.name}/", where=str(source), fix=f"Make it: {make} {run} {folder}")
    record = _json(folder / RECORD)
    found: Kind | None = "adapters" if (folder / MANIFEST).is_file() else _KIND_OF_EXPORT.get(record.get("kind", ""))
    if found is None:
        raise UserError(
            "nothing here that can be published: no stack.json, no merged model, no GGUF export",
            where=str(folder),
            fix="Give a run's folder, its stack, or what `merge` or `export gguf` wrote.",
        )
    if kind not in (None, found):
        raise UserError(f"this is {found}, not {kind}", where=str(folder), fix="Leave out what to publish.")
    stack = read_json(folder / MANIFEST) if found == "adapters" else record.get("stack")
    if not stack:
        raise UserError("no record of the base and stages of this model", where=str(folder), fix="Export it again.")
    base = public_base(found, stack["base"]["model"], base_id)
    release = Release(found, {}, _renamed(stack, base), base, export=record)
    if found == "adapters":
        _add_adapters(release, folder, run, workdir)
    else:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in _NOT_PUBLISHED:
                release.files[path.relative_to(folder).as_posix()] = path
        release.files[RECORD] = _bytes({**record, "stack": release.stack})
    if run is not None:
        _add_run(release, run)
    return release


def public_base(kind: Kind, model: str, base_id: str | None) -> str | None:
    """The base's name for others: a Hub id or `builtin:` name; None for a merged model of a local base.

    Raises:
        UserError: Adapters on a local base without a Hub id.
    """
    if not is_local(base_id or model):
        return base_id or model
    if kind != "adapters":
        return None
    raise UserError(
        f"the adapters' base is a folder of this machine, {model}: nobody else could load them",
        fix="Give that model's Hub id: --base-id ORGANISATION/NAME, in a recipe export.push.base_id.",
    )


def is_local(model: str) -> bool:
    """Whether a model's name is a path, not a Hub id or a `builtin:` name."""
    if model.startswith("builtin:"):
        return False
    return not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) or Path(model).exists()


def is_on_hub(path: str) -> bool:
    """Whether the name of a data set is a Hub id."""
    return "/" in path and not path.startswith("builtin:") and not is_local(path)


def without_paths(value: Any) -> Any:
    """`value` with every local path in it shortened to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\.?/|[A-Za-z]:[\\/])\S", value) and "\n" not in value:
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _is_run(folder: Path) -> bool:
    return (folder / "stack" / MANIFEST).is_file() and (folder / "recipe.yaml").is_file()


def _add_adapters(release: Release, folder: Path, run: Path | None, workdir: Path) -> None:
    """The combined adapter with the tokenizer at the root, where PEFT and vLLM look, and the stack in `stack/`."""
    manifest = read_manifest(folder)  # verifies the hashes
    combined = run / "combined" if run is not None else workdir / "combined"
    if not (combined / ADAPTER_FILES[0]).is_file():
        combined = workdir / "combined"
        combine_stack(folder, combined)
    for name in ADAPTER_FILES:
        release.files[name] = _adapter_file(combined / name, release.base)
    (workdir / "tokenizer").mkdir()
    copy_tokenizer(manifest, None, workdir / "tokenizer")
    release.files |= {path.name: path for path in sorted((workdir / "tokenizer").iterdir())}
    for entry in release.stack["adapters"]:
        for name in ADAPTER_FILES:
            content = _adapter_file(folder / entry["path"] / name, release.base)
            release.files[f"stack/{entry['path']}/{name}"] = content
            if isinstance(content, bytes):
                entry["sha256"][name] = hashlib.sha256(content).hexdigest()
        if (readme := folder / entry["path"] / "README.md").is_file():  # says that it needs the adapters below it
            release.files[f"stack/{entry['path']}/README.md"] = readme
    release.files[f"stack/{MANIFEST}"] = _bytes(release.stack)
    if release.base is not None and release.base.startswith("builtin:"):
        # PEFT cannot load built-in models, so the base is published too.
        source = Path(resolve_model_path(release.base))
        for path in [*companion_files(source), *sorted(source.glob("*.safetensors"))]:
            release.files[f"base/{path.name}"] = path


def _adapter_file(path: Path, base: str | None) -> Path | bytes:
    """A file of an adapter; in its configuration the base gets its name on the Hub, except above other adapters."""
    if path.name != ADAPTER_FILES[0]:
        return path
    config = _json(path)
    model = config.get("base_model_name_or_path")
    if model == base or str(model).startswith(UPPER_BASE.partition("{")[0]):
        return path
    return _bytes({**config, "base_model_name_or_path": base})


def _add_run(release: Release, run: Path) -> None:
    release.recipe = without_paths(yaml.safe_load((run / "recipe.yaml").read_text("utf-8")))
    release.report = without_paths(_json(run / "report.json"))
    text = "# Local paths are cut to their last part.\n" + dump_yaml(release.recipe)
    release.files["training/recipe.yaml"] = text.encode()
    for stage in release.stages:
        curves = run / "stages" / stage / "curves.png"
        if curves.is_file():
            release.files[f"training/{stage}.png"] = curves


def dump_yaml(value: Any) -> str:
    """YAML in the order of `value`'s keys."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _renamed(stack: dict[str, Any], base: str | None) -> dict[str, Any]:
    renamed = copy.deepcopy(stack)
    model = renamed["base"]["model"]
    renamed["base"]["model"] = base or without_paths(model)
    return renamed


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
