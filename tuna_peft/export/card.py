"""The model card: everything that somebody who finds the model on the Hub needs. `hub` calls it.

The text is in `card.md.jinja` and, for how to load the model, in `usage.md.jinja`; here is what they need to know.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

import tuna_peft
from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.export.card_results import eval_results, evaluation_tables
from tuna_peft.export.loading import BASE, ON_UNQUANTIZED, mean_kl, nearest_export, quantization_arguments
from tuna_peft.export.release import Release, dump_yaml, is_on_hub
from tuna_peft.limits import VLLM_LORA_RANKS
from tuna_peft.markup import code, render

# From the Hub's list: huggingface.js, packages/tasks/src/model-libraries.ts
_LIBRARY = {"adapters": "peft", "merged": "transformers", "gguf": "llama-cpp-python"}


def model_card(release: Release, repo_id: str, *, license: str | None = None, data_license: str | None = None) -> str:
    """The README.md of a repository, metadata included.

    Args:
        release: What is published.
        repo_id: The repository that it is published in.
        license: Identifier of the base's license, which this model inherits; None leaves it open.
        data_license: License of the training data, in words; None says that nothing was stated.
    """
    name = repo_id.rpartition("/")[2]
    return render(
        "export/card.md.jinja",
        release=release,
        repo_id=repo_id,
        name=name,
        version=tuna_peft.__version__,
        metadata=_metadata(release, name, license),
        built_in=release.base is not None and release.base.startswith("builtin:"),
        quantization=release.stack["quantization"] and quantization_arguments(release.stack),
        has_tokenizer="tokenizer_config.json" in release.files,
        distances=_distances(release),
        nearest=nearest_export(release.report.get("exports")),
        combine_rank=((release.recipe or {}).get("export") or {}).get("combine_rank"),
        vllm_rank=_vllm_rank(release) if release.kind == "adapters" else None,
        gguf_files=[(path, release.size(path)) for path in release.files if PurePosixPath(path).suffix == ".gguf"],
        prompts=_prompts(release),
        stages=_stages(release),
        results=evaluation_tables(release),
        pictures=[(Path(path).stem, path) for path in release.files if re.fullmatch(r"training/[^/]+\.png", path)],
        costs=_costs(release),
        divergences=_divergences(release),
        license=license,
        data_license=data_license,
        data=[(stage, path, is_on_hub(path)) for stage, path in _data_paths(release).items()],
        recipe=dump_yaml(release.recipe).rstrip() if release.recipe is not None else None,
    )


def _metadata(release: Release, name: str, license: str | None) -> ModelCardData:
    base = release.base if release.base and "/" in release.base else None
    results = eval_results(release)
    return ModelCardData(
        base_model=base,
        base_model_relation=release.relation if base else None,
        datasets=[path for path in _data_paths(release).values() if is_on_hub(path)] or None,
        library_name=_LIBRARY[release.kind],
        license=license,
        pipeline_tag="text-generation",
        tags=["tuna", "ranking", *(["lora", "peft"] if release.kind == "adapters" else []), release.kind],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _vllm_rank(release: Release) -> int:
    """The smallest rank that vLLM accepts and that holds the combined adapter."""
    config = release.files["adapter_config.json"]
    rank = json.loads(config if isinstance(config, bytes) else config.read_bytes())["r"]
    return next((accepted for accepted in VLLM_LORA_RANKS if accepted >= rank), rank)


def _prompts(release: Release) -> tuple[str, str] | str | None:
    """The prompt with and without an input, or `chat`; None when the stack names none."""
    settings = release.stack["prompt"]
    if not settings or settings["template"] == "chat":
        return settings and "chat"
    template = PromptTemplate(PromptConfig.model_validate(settings))
    return str(template.render("{instruction}", "{input}")), str(template.render("{instruction}"))


def _stages(release: Release) -> list[dict[str, Any]]:
    recipe = release.recipe or {}
    stages = {stage["name"]: stage for stage in recipe.get("stages", [])}
    rows = []
    for index, name in enumerate(release.stages):
        stage = stages.get(name, {})
        lora = {**recipe.get("lora", {}), **stage.get("lora", {})}
        rows.append(
            {
                "": index + 1,
                "stage": code(name),
                "type": stage.get("type", ""),
                "data": stage.get("data", {}).get("path", ""),
                "rank": lora.get("r", ""),
                "alpha": f"{lora.get('alpha', '')}{' (rsLoRA)' if lora.get('use_rslora') else ''}",
            }
        )
    return rows


def _costs(release: Release) -> list[dict[str, Any]]:
    rows = []
    for name in release.stages:
        done = release.report.get("stages", {}).get(name) or {}
        row: dict[str, Any] = {"stage": code(name)}
        for key, title in (("steps", "steps"), ("seconds", "seconds"), ("peak_memory_gib", "peak GiB")):
            if isinstance(done.get(key), int | float):
                row[title] = f"{done[key]:,.5g}"
        rows.append(row)
    return rows


def _distances(release: Release) -> dict[str, str]:
    """What the run measured of the merged model and of the adapter on a base without quantization, in words."""
    exports = dict(release.report.get("exports") or {})
    merged = exports.get("merged") or {}
    if release.kind == "adapters" and (merged.get("base"), merged.get("dtype")) != ("dequantized", "bfloat16"):
        exports.pop("merged", None)  # not what `tuna-peft merge` will write
    found = {}
    for key, name in (("merged", "merged"), ("unquantized", ON_UNQUANTIZED)):
        kl = mean_kl(exports, name)
        found[key] = (
            "; not measured by the run"
            if kl is None
            else f"; mean KL divergence from the trained adapters {kl:.1e} nats"
        )
    if (base := mean_kl(exports, BASE)) is not None and mean_kl(exports, ON_UNQUANTIZED) is not None:
        found["unquantized"] += f", where training changed the base by {base:.1e}"
    return found


def _divergences(release: Release) -> list[dict[str, Any]]:
    exports = (release.report.get("exports") or {}).items()
    return [
        {
            "export": name,
            "mean KL (nats)": f"{measured['kl_mean']:.2e}{_below(measured)}",
            "largest KL": f"{measured['kl_max']:.2e}",
            "top-1 agreement": f"{measured['top1_agreement']:.1%}",
            "tokens": f"{measured['tokens']:,}",
        }
        for name, export in exports
        if isinstance(export, dict) and (measured := export.get("divergence"))
    ]


def _below(measured: dict[str, Any]) -> str:
    noise = measured.get("noise")  # earlier versions did not measure it
    return " (rounding noise)" if noise is not None and measured["kl_mean"] < noise else ""


def _data_paths(release: Release) -> dict[str, str]:
    """Paths or Hub ids of the training data, by stage."""
    stages = (release.recipe or {}).get("stages", [])
    return {stage["name"]: stage["data"]["path"] for stage in stages if "path" in stage.get("data", {})}
