"""Exports that are known to be far from the adapters are named before they are written."""

from __future__ import annotations

from typing import Any

import pytest

from tuna_peft.recipe.export_notes import export_notes
from tuna_peft.recipe.schema import Recipe


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
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "base": {"model": "a/b"},
            "quantization": {"method": method},
            "stages": [{"name": "sft", "type": "sft", "data": {"path": "a/b"}}],
            "export": export,
        }
    )
    notes = list(export_notes(recipe))
    expected = words if method == "nf4" else []
    assert [note[: len(start)] for note, start in zip(notes, expected, strict=True)] == expected
