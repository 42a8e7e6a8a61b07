"""What a recipe may say under `evaluation`: the tasks by name, and what they share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tuna_peft.data.config import DataSource, MayBeLocal, Overflow
from tuna_peft.feedback.judge_settings import JudgeSettings


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


class _Benchmark(BaseModel):
    """What the published benchmarks share."""

    model_config = ConfigDict(extra="forbid")

    wrap: bool = Field(
        True, description="Put each text of the benchmark into the recipe's prompt template as an instruction; false "
        "gives it to the model as it is."
    )  # fmt: skip


class SuperNITask(_Benchmark):
    """Super-NaturalInstructions, prompted and scored as by Tk-Instruct."""

    path: Annotated[str, MayBeLocal()] = Field(
        description="A checkout of allenai/natural-instructions, or a .jsonl file of instances."
    )
    tasks: list[str] | None = Field(None, description="Names of tasks; null takes the benchmark's test tasks.")
    per_task: int = Field(100, ge=1, description="The first so many instances of each task.")
    shots: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0, 2], description="Positive examples in the prompt; one result for each number."
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest generated response, in tokens.")


class LMentryTask(_Benchmark):
    """LMentry: 25 elementary tasks and the variants for robustness, scored by its rules."""

    path: Annotated[str, MayBeLocal()] = Field(
        description="The benchmark's `data` folder, or a checkout of aviaefrat/lmentry."
    )
    tasks: list[str] | None = Field(None, description="Names of tasks or variants; null takes all 41.")
    per_template: int | None = Field(
        None, ge=1, description="The first so many examples of each of a task's three templates; null takes all."
    )
    first_sentence: bool = Field(
        False, description="Score the first line up to its first full stop, for models that do not stop by themselves."
    )
    max_new_tokens: int = Field(50, ge=1, description="Longest generated response, in tokens.")


class VicunaTask(_Benchmark):
    """Vicuna QA: open questions, whose answers a judge compares with another model's, in both orders."""

    path: Annotated[str, MayBeLocal()] = Field(
        description="FastChat's question.jsonl: `question_id`, `text`, `category` a line."
    )
    against: Annotated[str, MayBeLocal(only_file=True)] = Field(
        "base", description="The other side: a stage of the same model (`base`, for example), or a file of answers."
    )
    judge: JudgeSettings = Field(description="Who compares, see `tuna-peft judge`; it is asked in both orders.")
    max_new_tokens: int = Field(1024, ge=1, description="Longest generated response, in tokens.")


class LMEvalTask(BaseModel):
    """Tasks of EleutherAI's lm-evaluation-harness; needs the extra `lm-eval`."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[str] = Field(min_length=1, description="Names of the harness's tasks or groups.")
    include_path: Annotated[str | None, MayBeLocal()] = Field(
        None, description="A folder with task files of your own."
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples in the prompt; null is each task's own number.")
    limit: int | None = Field(None, ge=1, description="The first so many documents of each task; null takes all.")


class TaskSettings(BaseModel):
    """The tasks of an evaluation, by name."""

    model_config = ConfigDict(extra="forbid")

    ranking: RankingTask | None = Field(None, description="Held-out ranked data: pair accuracy and its relatives.")
    graded: GradedTask | None = Field(None, description="Held-out prompts and a program that grades responses.")
    superni: SuperNITask | None = Field(None, description="Super-NaturalInstructions: ROUGE-L and exact match.")
    lmentry: LMentryTask | None = Field(None, description="LMentry: accuracy and robustness on elementary tasks.")
    vicuna: VicunaTask | None = Field(None, description="Vicuna QA: wins and losses by a judge.")
    lm_eval: LMEvalTask | None = Field(None, description="Any tasks of EleutherAI's harness.")

    def given(self) -> dict[str, BaseModel]:
        """The tasks that are to be run, by name."""
        return {name: task for name in type(self).model_fields if (task := getattr(self, name)) is not None}


class EvaluationSettings(BaseModel):
    """What is measured before the first stage and after each."""

    model_config = ConfigDict(extra="forbid")

    tasks: TaskSettings = Field(default_factory=TaskSettings, description="What to measure, by the name of the task.")
    batch_size: int = Field(32, ge=1, description="Prompts evaluated at once.")
