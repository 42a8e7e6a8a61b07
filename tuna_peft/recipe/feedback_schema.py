"""The key `data` of a stage: a data set, or prompts whose responses the run samples and ranks itself.

`recipe/schema.py` includes it in `Stage`; `run/rank_samples.py` does what it says. Only pydantic is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, PositiveFloat, Tag, model_validator

from tuna_peft.data.config import DataSource, Section
from tuna_peft.feedback.settings import JudgeSettings, SampleServer, SampleSettings, ScoreSettings


class StageServer(SampleServer):
    """A server for the model that the run exports. You start it; the run prints the command and waits."""

    model: str = Field(
        "tuna",
        min_length=1,
        description="The model's name on that server; `engine: transformers` names it after its folder instead.",
    )
    export: Literal["merged", "combined"] = Field(
        "merged",
        description="What the run exports for the server: a merged model, or one adapter beside the unquantized base.",
    )
    engine: Literal["vllm", "sglang", "llama.cpp", "transformers"] = Field(
        "vllm", description="Engine that the printed command starts; any other with the same interface can serve too."
    )
    wait_minutes: PositiveFloat = Field(
        60.0, description="Minutes to wait for a server that answers as the run's model does."
    )

    @model_validator(mode="after")
    def _engine_serves_the_export(self) -> StageServer:
        if self.export == "combined" and self.engine not in ("vllm", "sglang"):
            raise ValueError(f"`engine: {self.engine}` needs `export: merged`")
        return self


class StageSample(SampleSettings):
    """Responses sampled from a model of this run."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    from_stage: str | None = Field(
        None,
        alias="from",
        description="Model to sample from: an earlier stage, or `base`; null is the model that this stage trains on.",
    )
    server: StageServer | None = Field(None, description="Sample by a server, to which the run exports its model.")


class FeedbackSource(Section):
    """Prompts whose responses the run ranks itself: sampled by `sample`, ranked by `score` or `judge`."""

    prompts: DataSource = Field(description="The prompts; without `sample`, each with its responses.")
    sample: StageSample | None = Field(
        None, description="Sample responses from the run's own model; null ranks those in `prompts`."
    )
    score: ScoreSettings | None = Field(None, description="Rank by a teacher's log-probabilities.")
    judge: JudgeSettings | None = Field(None, description="Rank by a judge: a server, a model, or a Python function.")

    @model_validator(mode="after")
    def _one_way_to_rank(self) -> FeedbackSource:
        if (self.score is None) == (self.judge is None):
            raise ValueError("`prompts` need exactly one of `score` (a teacher) and `judge`, to be ranked by")
        if self.sample is not None and self.score is not None and self.score.generate is not None:
            raise ValueError("`sample` has no effect with `score.generate`: the server generates the responses")
        return self


def _kind(data: Any) -> str:
    prompts = "prompts" in data if isinstance(data, dict) else isinstance(data, FeedbackSource)
    return FEEDBACK if prompts else FILE


# Tags of the two kinds. Pydantic puts them into the location of an error, where `recipe/load.py` removes them; no key
# of a recipe looks like this.
FILE, FEEDBACK = "<file>", "<feedback>"

StageData = Annotated[
    Annotated[DataSource, Tag(FILE)] | Annotated[FeedbackSource, Tag(FEEDBACK)], Discriminator(_kind)
]
