"""What is known of a recipe's exports before they are written. `plan` and `run --dry-run` print it."""

from __future__ import annotations

from collections.abc import Iterator

from tuna_peft.recipe.schema import Recipe


def export_notes(recipe: Recipe) -> Iterator[str]:
    """Exports of a 4-bit base that will be far from the trained adapters, and what to export instead.

    The figures are those of SmolLM2-135M in docs/export.md.
    """
    export, method = recipe.export, recipe.quantization.method
    if method not in ("nf4", "fp4"):
        return
    merged_as_trained = export.merge.enabled and export.merge.base != "original"
    twice = [kind for kind in export.gguf if kind.startswith(("q4", "q5"))]
    if twice and merged_as_trained and export.gguf_base != "auto":
        kinds = ", ".join(twice)
        yield f"GGUF {kinds} quantizes the dequantized base again; `export.gguf_base=auto` measures the original too"
    if export.merge.enabled and export.merge.dtype == "nf4":
        yield "rounding to nf4 undoes most of the update; `tuna-peft combine --with-base` keeps it in 4 bits"
    if export.merge.enabled and not merged_as_trained:
        yield "the original base is not the one of training: merge into `dequantized` unless you measured both"
