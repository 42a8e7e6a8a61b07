"""The nearest and the far exports are named before they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tuna_peft.recipe.export_notes import MEASURED, export_notes
from tuna_peft.recipe.schema import Recipe


def recipe_with(export: dict[str, Any], method: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "base": {"model": "a/b"},
            "quantization": {"method": method},
            "stages": [{"name": "sft", "type": "sft", "data": {"path": "a/b"}}],
            "export": export,
        }
    )


@pytest.mark.parametrize(
    ("export", "words"),
    [
        ({}, []),
        ({"gguf": ["q8_0", "f16"]}, []),
        ({"gguf": ["q8_0", "q4_0", "q5_1"]}, ["GGUF q4_0, q5_1 quantizes the dequantized base again"]),
        ({"gguf": ["q4_0"], "gguf_base": "auto"}, []),
        ({"gguf": ["q4_0"], "merge": {"base": "original"}}, ["the original base is not the one of training"]),
        ({"merge": {"dtype": "nf4"}}, ["rounding to nf4 undoes most of the update"]),
        ({"merge": {"dtype": "nf4", "enabled": False}}, []),
    ],
)
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_what_is_named(export: dict[str, Any], words: list[str], method: str) -> None:
    notes = [note for note in export_notes(recipe_with(export, method)) if "nearest" not in note]
    expected = words if method == "nf4" else []
    assert [note[: len(start)] for note, start in zip(notes, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("export", "method", "names"),
    [
        ({}, "nf4", ["combined adapter on the base as in training", "merged model"]),
        ({"gguf": ["q4_0", "q8_0"], "combine": False}, "fp4", ["merged model", "GGUF q8_0", "GGUF q4_0"]),
        (
            {"gguf": ["q5_1"], "merge": {"base": "original"}},
            "nf4",
            ["combined", "merged model", "GGUF q5_1 (no figure)"],
        ),
        ({"combine": False}, "nf4", []),
        ({"combine_rank": 4, "gguf": ["q5_1"]}, "none", ["merged model", "GGUF q5_1 (no figure)"]),
    ],
)
def test_exports_are_named_by_their_distance(export: dict[str, Any], method: str, names: list[str]) -> None:
    notes = [note for note in export_notes(recipe_with(export, method)) if "nearest" in note]
    assert len(notes) == bool(names)
    places = [notes[0].index(name) for name in names]
    assert places == sorted(places)


def test_auto_takes_the_nearer_base() -> None:
    [merged, auto] = [
        next(export_notes(recipe_with({"gguf": ["q4_0"], "gguf_base": base}, "nf4"))) for base in ("merged", "auto")
    ]
    assert "GGUF q4_0 (1.2e+00 nats)" in merged and "GGUF q4_0 (9.4e-01 nats)" in auto


def test_the_figures_are_those_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    for model, measured in MEASURED.items():
        [section] = re.findall(rf"^\*\*{model}\*\*(.*?)(?=^\*\*|\Z)", text, re.DOTALL | re.MULTILINE)
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")
        ]
        column = next(rows[0].index(cell) for cell in rows[0] if cell.startswith("KL"))
        found = {re.sub(r" \(.*\)$", "", row[0]): row[column] for row in rows[2:]}
        for export, kl in measured.items():
            assert float(found[export].strip("*")) == kl, f"{model}: {export}"
