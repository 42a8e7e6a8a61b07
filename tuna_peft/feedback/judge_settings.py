"""What a recipe or a command says about a judge. Only pydantic is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tuna_peft.data.config import MayBeLocal
from tuna_peft.feedback.server import ServerSettings


class JudgeSettings(BaseModel):
    """Who ranks the responses, and how: one of `server`, `model` and `function`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    server: ServerSettings | None = Field(None, description="A judge behind an OpenAI-compatible server.")
    model: Annotated[str | None, MayBeLocal()] = Field(
        None, description="A judge that runs here: Hub id, path, `builtin:pico-llama`, a stack, or a run's folder."
    )
    revision: str | None = Field(None, description="With `model`: branch, tag or commit on the Hub.")
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="With `model`: how a single model is stored; a stack keeps its own."
    )
    trust_remote_code: bool = Field(False, description="With `model`: run code that comes with it.")
    function: str | None = Field(
        None,
        description="A program as judge, for tasks whose answers can be checked: `module:function` or `builtin:pico`. "
        "It is given a prompt's record and a response and returns a number, higher is better.",
    )
    instructions: str | None = Field(None, description="What else should count, in words for the judge.")
    both_orders: bool = Field(
        False, description="Ask twice, with the responses in opposite order; where the answers differ there is a tie."
    )
    include_judge_answer: Literal[False, True, "reference"] = Field(
        False,
        description="What becomes of the judge's own response: true ranks it first (where the judge does so, too), "
        "`reference` makes it the reference response, false leaves it out.",
    )
    structured: bool = Field(True, description="Ask a server for JSON by schema; dropped where it does not know how.")
    temperature: float = Field(0.0, ge=0, le=2, description="Of the first attempt; later ones are a little hotter.")
    max_tokens: PositiveInt = Field(2048, description="Longest answer of the judge.")
    attempts: PositiveInt = Field(3, le=20, description="Answers to ask for until one can be read.")
    seed: int = Field(0, description="Of the order in which responses are shown.")
    batch_size: PositiveInt = Field(8, description="With `model`: questions answered at once.")
    on_no_answer: Literal["error", "skip"] = Field(
        "error",
        description="What a prompt does to which a server gives no answer at all, or a program no number: `error` "
        "stops once all others have theirs, `skip` leaves it out and counts it, as Vicuna QA always does. Answers "
        "that cannot be read are left out in any case.",
    )

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeSettings:
        given = [name for name in ("server", "model", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of `server`, `model` and `function`, not {' and '.join(given) or 'none'}")
        for name in ("revision", "trust_remote_code"):
            if self.model is None and getattr(self, name):
                raise ValueError(f"`{name}` has no effect without `model`")
        if self.function is not None:
            for name in ("instructions", "both_orders", "include_judge_answer"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` has no effect with `function`: a program grades each response alone")
        return self
