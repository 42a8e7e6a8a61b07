"""What a recipe or a command line says about samples and teachers. Only pydantic is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuna_peft.data.config import MayBeLocal
from tuna_peft.feedback.server import ServerSettings


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


class GenerateSettings(BaseModel):
    """Responses that the teacher's server draws itself, as text-davinci-003 did for the paper."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(4, ge=2, le=128, description="Responses per prompt.")
    temperature: float = Field(1.0, gt=0, le=2, description="Of the server's samples.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the fewest tokens that hold this much probability.")
    max_tokens: int = Field(512, ge=1, description="Longest response, in the server's tokens.")


class ScoreSettings(BaseModel):
    """A teacher whose log-probabilities rank the responses: one of `model` and `server`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: Annotated[str | None, MayBeLocal()] = Field(
        None, description="A teacher that runs here: Hub id, path, `builtin:pico-llama`, a stack, or a run's folder."
    )
    revision: str | None = Field(None, description="With `model`: branch, tag or commit on the Hub.")
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="With `model`: how a single model is stored; a stack keeps its own."
    )
    trust_remote_code: bool = Field(False, description="With `model`: run code that comes with it.")
    max_tokens_per_batch: int = Field(
        4096, ge=1, description="With `model`: most tokens of a forward pass; halved when memory runs out."
    )
    server: ServerSettings | None = Field(
        None, description="A teacher behind a completions server that returns log-probabilities of the prompt."
    )
    tokenizer: Annotated[str | None, MayBeLocal()] = Field(
        None,
        description="With `server`: the teacher's tokenizer. Prompts are then sent as token ids with EOS behind the "
        "response, and vLLM's `prompt_logprobs` is asked for; without it text is sent, with `echo` and `logprobs`.",
    )
    generate: GenerateSettings | None = Field(
        None, description="With `server`: it draws the responses itself; sampling and scoring in one request."
    )
    length_penalty: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="score = sum of token log-probabilities / length ** this."
    )
    on_no_answer: Literal["error", "skip"] = Field(
        "error",
        description="With `server`: what a prompt without an answer does once all others have theirs: stop, or be "
        "left out and counted.",
    )

    @model_validator(mode="after")
    def _one_teacher(self) -> ScoreSettings:
        if (self.model is None) == (self.server is None):
            raise ValueError("give either `model` (a teacher that runs here) or `server`")
        of_model = ("revision", "trust_remote_code")
        of_server = ("tokenizer", "generate")
        for name in of_server if self.server is None else of_model:
            if getattr(self, name):
                raise ValueError(f"`{name}` has no effect with `{'model' if self.server is None else 'server'}`")
        if self.generate is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` has no effect with `generate`: the server counts its own tokens")
        return self
