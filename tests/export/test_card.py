"""The model card of a run's folder: complete, valid, and without this machine in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny_llama import Tiny

from tuna_peft.export.card import model_card
from tuna_peft.export.merge import merge_stack
from tuna_peft.export.release import Kind, Release, collect_release, is_local, without_paths

METRIC = {"value": 0.625, "low": 0.6, "high": 0.65, "count": 40}
REPORT: dict[str, Any] = {
    "evaluation": {
        "base": {"ranking": {"main": "pair_accuracy", "metrics": {"pair_accuracy": {"value": 0.5}}}},
        "ranking": {
            "ranking": {
                "main": "pair_accuracy",
                "metrics": {"pair_accuracy": METRIC, "mrr": METRIC},
                "excluded": [{"reason": "the line is no JSON", "count": 2, "names": ["a", "b"]}],
            }
        },
    },
    "stages": {"ranking": {"steps": 120, "seconds": 36.2, "peak_memory_gib": 0.9}},
    "environment": {"gpu": "NVIDIA T4", "python": "3.11", "packages": {"torch": "2.13"}},
    "exports": {"combined": {"divergence": {"kl_mean": 1e-13, "kl_max": 1e-12, "top1_agreement": 1.0, "tokens": 9}}},
}
RECIPE = {
    "name": "mine",
    "base": {"model": "/home/me/models/tiny"},
    "lora": {"r": 4, "alpha": 8},
    "stages": [
        {"name": "sft", "type": "sft", "data": {"path": "tatsu-lab/alpaca"}},
        {
            "name": "ranking",
            "type": "ranking",
            "data": {"path": "/home/me/judged.jsonl"},
            "lora": {"r": 2, "use_rslora": True},
        },
    ],
    "evaluation": {"tasks": {"ranking": {"path": "someone/held-out"}}},
}


def write_run(folder: Path, tiny: Tiny, report: dict[str, Any] | None) -> Path:
    import shutil

    folder.mkdir()
    shutil.copytree(tiny.stack, folder / "stack")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for stage in ("sft", "ranking"):
        (folder / "stages" / stage).mkdir(parents=True)
        (folder / "stages" / stage / "curves.png").write_bytes(b"png")
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def release_of(tiny: Tiny, tmp_path: Path, report: dict[str, Any] | None = REPORT) -> Release:
    (tmp_path / "work").mkdir()
    return collect_release(write_run(tmp_path / "run", tiny, report), tmp_path / "work", base_id="someone/tiny")


def test_metadata_is_valid_and_complete(tiny: Tiny, tmp_path: Path) -> None:
    card = ModelCard(model_card(release_of(tiny, tmp_path), "me/mine", license="mit"))
    data = card.data.to_dict()
    assert data["base_model"] == "someone/tiny"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("peft", "mit", "text-generation")
    assert data["datasets"] == ["tatsu-lab/alpaca"]
    [index] = data["model-index"]
    [result] = index["results"]
    assert result["dataset"] == {"name": "someone/held-out", "type": "someone/held-out"}
    assert [metric["value"] for metric in result["metrics"]] == [0.625, 0.625]


@pytest.mark.parametrize("evaluation", ["auto", None])
def test_a_run_without_tasks_of_its_own_names_the_task_as_data_set(
    tiny: Tiny, tmp_path: Path, evaluation: str | None
) -> None:
    release = release_of(tiny, tmp_path)
    assert release.recipe is not None
    release.recipe["evaluation"] = evaluation
    answers = {"main": "characters", "metrics": {"characters": METRIC}, "excluded": []}
    release.report["evaluation"]["ranking"]["answers"] = answers
    card = ModelCard(model_card(release, "me/mine"))
    [index] = card.data.to_dict()["model-index"]
    # The length of answers is no result.
    assert [result["dataset"] for result in index["results"]] == [{"name": "ranking", "type": "ranking"}]
    assert "characters" not in card.content


def test_the_text_has_what_a_stranger_needs(tiny: Tiny, tmp_path: Path) -> None:
    text = model_card(release_of(tiny, tmp_path), "me/mine", data_license="CC BY 4.0")
    for part in (
        "| `ranking` | 0.625 [0.600, 0.650] |",
        "| `base` | 0.500 |",
        "- ranking: 2, the line is no JSON",
        "NVIDIA T4",
        "| `ranking` | 120 | 36.2 | 0.9 |",
        "judged.jsonl | 2 | 8 (rsLoRA) |",
        "![sft](training/sft.png)",
        "vllm serve someone/tiny --enable-lora --max-lora-rank 16 --lora-modules tuna=me/mine",
        "### Instruction:\n{instruction}\n\n### Response:",
        "CC BY 4.0",
        "li2023tuna",
        "| combined | 1.00e-13 |",
        "path: judged.jsonl",
    ):
        assert part in text, part
    for secret in ("/home/me", tiny.base, str(tmp_path)):
        assert secret not in text


def test_every_way_to_load_gives_the_base_of_training_or_states_its_distance(tiny: Tiny, tmp_path: Path) -> None:
    release = release_of(tiny, tmp_path)
    text = model_card(release, "me/mine")
    assert "which it was not trained on; not measured by the run" in text
    assert "nearest to the trained adapters is the combined adapter on the base as in training: mean KL" in text
    measured = {"kl_max": 1.0, "top1_agreement": 0.5, "tokens": 9, "noise": 1e-3}
    release.report["exports"] = {
        "base without adapters": {"divergence": {"kl_mean": 0.08, **measured}},
        "combined on the unquantized base": {"divergence": {"kl_mean": 0.64, **measured}},
        "merged": {"divergence": {"kl_mean": 2e-4, **measured}, "base": "dequantized", "dtype": "bfloat16"},
    }
    text = model_card(release, "me/mine")
    for part in (
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='float32')",
        "which it was not trained on; mean KL divergence from the trained adapters 6.4e-01 nats, where training",
        "as a merged model; mean KL divergence from the trained adapters 2.0e-04 nats:",
        "| merged | 2.00e-04 (rounding noise) |",
        "nearest to the trained adapters is the merged model: mean KL divergence\n2.0e-04 nats",
        'AutoTokenizer.from_pretrained("me/mine")',
    ):
        assert part in text, part
    assert text.index("vllm serve merged") < text.index("--enable-lora --max")
    release.report["exports"]["merged"]["dtype"] = "nf4"  # `tuna-peft merge` of the card writes bfloat16
    assert "as a merged model; not measured by the run" in model_card(release, "me/mine")
    release.stack["quantization"] = None
    assert "which it was not trained on" not in model_card(release, "me/mine")


def test_values_of_a_run_cannot_change_the_structure_of_the_card(tiny: Tiny, tmp_path: Path) -> None:
    def structure(text: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
        return [token.type for token in tokens]

    release = release_of(tiny, tmp_path)
    plain = structure(model_card(release, "me/mine"))
    assert {"heading_open", "table_open", "fence"} <= {*plain}
    harm = "# h\n\n## h\n\n- a\n\n```\n<b>|</b> ![x](y) `"
    release.report["evaluation"]["ranking"]["ranking"]["excluded"][0]["reason"] = harm
    release.report["environment"] = {"gpu": harm, "python": harm, "packages": {harm: harm}}
    release.report["exports"] = {harm: release.report["exports"]["combined"]}
    assert release.recipe is not None
    release.recipe["stages"][1]["data"]["path"] = release.recipe["stages"][1]["type"] = harm
    assert structure(model_card(release, "me/mine", data_license=harm)) == plain


@pytest.mark.parametrize(
    ("kind", "export", "relation", "library", "evaluated"),
    [
        ("merged", {"kind": "merged", "dtype": "bfloat16"}, "finetune", "transformers", True),
        ("merged", {"kind": "merged", "dtype": "nf4"}, "quantized", "transformers", False),
        ("gguf", {"kind": "gguf", "types": ["f16"]}, "finetune", "llama-cpp-python", True),
        ("gguf", {"kind": "gguf", "types": ["f16", "q4_0"]}, "finetune", "llama-cpp-python", False),
        ("gguf", {"kind": "gguf-adapter", "types": ["f32"]}, "adapter", "llama-cpp-python", True),
    ],
)
def test_metadata_says_what_the_files_are(
    tiny: Tiny, tmp_path: Path, kind: Kind, export: dict[str, Any], relation: str, library: str, evaluated: bool
) -> None:
    release = release_of(tiny, tmp_path)
    release.kind, release.export, release.files = kind, export, {"m.gguf": b""}
    card = ModelCard(model_card(release, "me/mine"))
    data = card.data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == (relation, library)
    assert ("model-index" in data) == evaluated
    assert ("quantized files here were not evaluated" in card.content) != evaluated


@pytest.mark.parametrize("report", [None, {}, {"evaluation": {"base": {}}}, {"evaluation": {"ranking": {"x": 3}}}])
def test_a_run_without_results_has_a_card_too(tiny: Tiny, tmp_path: Path, report: dict[str, Any] | None) -> None:
    card = ModelCard(model_card(release_of(tiny, tmp_path, report), "me/mine"))
    assert "## Evaluation" not in card.content
    assert "model-index" not in card.data.to_dict()


def test_a_merged_model_of_a_local_base_names_no_base(tiny: Tiny, tmp_path: Path) -> None:
    merge_stack(tiny.stack, tmp_path / "merged")
    release = collect_release(tmp_path / "merged", tmp_path)
    text = model_card(release, "me/merged")
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert tiny.base not in text
    record = release.files["tuna_export.json"]
    assert isinstance(record, bytes)
    assert tiny.base not in record.decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/data.json", "data.json"),
        ("~/models/tiny/", "tiny"),
        ("./data.json", "data.json"),
        ("C:\\data\\x.json", "x.json"),
        ("org/name", "org/name"),
        ("builtin:pico-llama", "builtin:pico-llama"),
        ("/ is a slash", "/ is a slash"),
        ("a\n/home/me", "a\n/home/me"),
        ({"a": ["/x/y", 1]}, {"a": ["y", 1]}),
    ],
)
def test_paths_are_cut(value: Any, expected: Any) -> None:
    assert without_paths(value) == expected


def test_what_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert all(map(is_local, ["/x/y", "./x", "~/x", "a/b/c", "org/here"]))
    assert not any(map(is_local, ["org/name", "gpt2", "builtin:pico-llama"]))
