"""What a recipe may say under `evaluation`: the tasks by name, and what they share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tuna_peft.data.config import DataSource

Overflow = Literal["error", "cut", "skip"]


class RankingTask(DataSource):
    """Held-out ranked responses: are the better ones the likelier ones?"""

    max_length: int | None = Field(
        None, ge=2, description="Longest prompt plus one response, in tokens; null is the model's context."
    )
    overflow: Overflow = Field("error", description="A response beyond it: `error` stops, `cut` its end, `skip` it.")
    margin: float = Field(0.1, ge=0, description="`margin_satisfaction`: the lead due for each step in rank.")


class GradedTask(DataSource):
    """Held-out prompts, whose greedy responses a program grades."""

    grader: str = Field(
        pattern=r"^[\w.-]+:[\w.-]+$",
        description="Grades a response between 0 and 1: `builtin:pico` or `module:function`.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest generated response, in tokens.")


class TaskSettings(BaseModel):
    """The tasks of an evaluation, by name."""

    model_config = ConfigDict(extra="forbid")

    ranking: RankingTask | None = Field(None, description="Held-out ranked data: pair accuracy and its relatives.")
    graded: GradedTask | None = Field(None, description="Held-out prompts and a program that grades responses.")

    def given(self) -> dict[str, BaseModel]:
        """The tasks that are to be run, by name."""
        return {name: task for name in type(self).model_fields if (task := getattr(self, name)) is not None}


class EvaluationSettings(BaseModel):
    """What is measured before the first stage and after each."""

    model_config = ConfigDict(extra="forbid")

    tasks: TaskSettings = Field(default_factory=TaskSettings, description="What to measure, by the name of the task.")
    batch_size: int = Field(32, ge=1, description="Prompts evaluated at once.")
