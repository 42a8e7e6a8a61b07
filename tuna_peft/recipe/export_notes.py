"""What is known of a recipe's exports before they are written. `plan` and `run --dry-run` print it."""

from __future__ import annotations

from collections.abc import Iterator

from tuna_peft.recipe.schema import Recipe

# KL divergence from the unmerged adapters in nats, by the base of training and the export. From docs/export.md (a test
# compares), whose notes say how it was measured.
MEASURED = {
    "SmolLM2-135M in NF4": {
        "dequantized, float32": 2.6e-4,
        "dequantized, float16": 2.7e-4,
        "dequantized, bfloat16": 1.9e-3,
        "dequantized, nf4": 1.5e-1,
        "dequantized, int8": 6.8e-2,
        "dequantized, GGUF f16": 1.9e-3,
        "dequantized, GGUF q8_0": 7.2e-3,
        "dequantized, GGUF q4_0": 1.2,
        "original, float32": 6.9e-1,
        "original, float16": 6.9e-1,
        "original, bfloat16": 7.0e-1,
        "original, nf4": 6.3e-2,
        "original, int8": 7.3e-1,
        "original, GGUF f16": 7.0e-1,
        "original, GGUF q8_0": 7.1e-1,
        "original, GGUF q4_0": 9.4e-1,
    },
    "pico-LLaMA in int8": {
        "dequantized, bfloat16": 5.2e-05,
        "dequantized, float16": 6.1e-05,
        "dequantized, float32": 6.2e-05,
        "dequantized, nf4": 2.6e-03,
        "dequantized, int8": 4.7e-05,
        "dequantized, GGUF f16": 5.2e-05,
        "dequantized, GGUF q8_0": 8.1e-05,
        "dequantized, GGUF q4_0": 2.6e-03,
        "original, bfloat16": 6.5e-05,
        "original, float16": 8.0e-05,
        "original, float32": 8.1e-05,
        "original, nf4": 2.7e-03,
        "original, int8": 7.9e-05,
        "original, GGUF f16": 6.5e-05,
        "original, GGUF q8_0": 7.2e-05,
        "original, GGUF q4_0": 2.8e-03,
    },
    "pico-LLaMA without quantization": {
        "original, bfloat16": 2.8e-06,
        "original, float16": 1.4e-08,
        "original, float32": 1.9e-13,
        "original, nf4": 2.5e-03,
        "original, int8": 6.3e-05,
        "original, GGUF f16": 2.8e-06,
        "original, GGUF q8_0": 2.2e-05,
        "original, GGUF q4_0": 2.5e-03,
    },
}
_MODELS = {
    "nf4": "SmolLM2-135M in NF4",
    "fp4": "SmolLM2-135M in NF4",
    "int8": "pico-LLaMA in int8",
    "none": "pico-LLaMA without quantization",
}


def export_notes(recipe: Recipe) -> Iterator[str]:
    """Which export will be nearest to the trained adapters, which will be far from them, and what to do instead."""
    export, method = recipe.export, recipe.quantization.method
    yield from _by_distance(recipe)
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


def _by_distance(recipe: Recipe) -> Iterator[str]:
    """The exports of the recipe, the one that is expected to be nearest to the trained adapters first."""
    export, model = recipe.export, _MODELS[recipe.quantization.method]
    measured = MEASURED[model]
    found: dict[str, float | None] = {}
    if export.combine and export.combine_rank is None:
        found["combined adapter on the base as in training"] = 0.0  # apart from the rounding of fp32
    if export.merge.enabled:
        quantized = recipe.quantization.method != "none" and export.merge.base != "original"
        merged_into = "dequantized" if quantized else "original"
        found["merged model"] = measured.get(f"{merged_into}, {export.merge.dtype}")
        bases = ("dequantized", "original") if export.gguf_base == "auto" else (merged_into,)
        for kind in export.gguf:
            distances = [measured[name] for base in bases if (name := f"{base}, GGUF {kind}") in measured]
            found[f"GGUF {kind}"] = min(distances, default=None)
    known = {name: kl for name, kl in found.items() if kl is not None}
    if len(found) > 1 and known:
        ranked = ", ".join(f"{name} ({known[name]:.1e} nats)" for name in sorted(known, key=lambda name: known[name]))
        others = "".join(f", {name} (no figure)" for name in found if name not in known)
        yield (
            f"nearest to the trained adapters first: {ranked}{others}; KL divergences of {model} from docs/export.md, "
            "which the end of the run replaces by its own"
        )
