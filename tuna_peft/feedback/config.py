"""What a recipe or a command line says about samples and teachers. Only pydantic is imported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SampleSettings(BaseModel):
    """How responses are drawn from a model. The defaults are those of Tuna's released code."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(4, ge=2, description="Responses per prompt.")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Of the first draw.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the fewest tokens that hold this much probability.")
    max_new_tokens: int = Field(512, ge=1, description="Longest response, in tokens; a longer one is cut and counted.")
    max_similarity: float = Field(
        0.8,
        gt=0,
        description="Draw a prompt's responses again when two of them have this ROUGE-L F1 or more. Above 1: never.",
    )
    hotter_by: float = Field(0.1, ge=0, allow_inf_nan=False, description="Added to the temperature for each new draw.")
    trials: int = Field(3, ge=1, description="Draws at most; the one with the least mean ROUGE-L F1 is kept.")
    batch_size: int = Field(32, ge=1, description="Responses generated at once; halved when memory runs out.")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="`vllm` is faster on a GPU with room for a second copy of the model; extra `vllm`."
    )
