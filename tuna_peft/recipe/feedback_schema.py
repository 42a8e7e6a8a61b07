"""What a recipe may say of a stage's data: a file, or prompts for which the run makes ranks itself."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from tuna_peft.data.config import DataSource
from tuna_peft.feedback.config import SampleSettings, ScoreSettings
from tuna_peft.feedback.judge_settings import JudgeSettings


class StageSample(SampleSettings):
    """Responses drawn from a model of this run."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, serialize_by_alias=True)

    from_stage: str | None = Field(
        None,
        alias="from",
        description="Whose responses: an earlier stage's name, or `base`; null is what the stage stands on.",
    )


class FeedbackSource(BaseModel):
    """Prompts whose responses are ranked by the run: drawn by `sample`, ordered by `score` or `judge`."""

    model_config = ConfigDict(extra="forbid")

    prompts: DataSource = Field(description="The prompts; without `sample`, with responses to each.")
    sample: StageSample | None = Field(
        None, description="Draw responses from the run's own model; null takes those that stand in `prompts`."
    )
    score: ScoreSettings | None = Field(None, description="Ranked by a teacher's log-probabilities.")
    judge: JudgeSettings | None = Field(None, description="Ranked by a judge: a server, a model, or a program.")

    @model_validator(mode="after")
    def _one_way_to_rank(self) -> FeedbackSource:
        if (self.score is None) == (self.judge is None):
            raise ValueError("`prompts` need `score` (a teacher) or `judge`, one of them, to be ranked by")
        if self.sample is not None and self.score is not None and self.score.generate is not None:
            raise ValueError("`sample` has no effect with `score.generate`: the teacher's server draws the responses")
        return self


def _kind(data: Any) -> str:
    prompts = "prompts" in data if isinstance(data, dict) else isinstance(data, FeedbackSource)
    return FEEDBACK if prompts else FILE


# What pydantic puts between the keys in an error's place; no key of a recipe looks like this.
FILE, FEEDBACK = "<file>", "<feedback>"

StageData = Annotated[
    Annotated[DataSource, Tag(FILE)] | Annotated[FeedbackSource, Tag(FEEDBACK)], Discriminator(_kind)
]
