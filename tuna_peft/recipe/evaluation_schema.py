"""The keys under `evaluation` in a recipe: the settings of each task, and those that all tasks share.

`recipe/schema.py` includes them in `Recipe`; `tuna-peft evaluate` takes the same keys. `run/tasks.py` reads the data.
Only pydantic is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tuna_peft.data.config import DataSource, MayBeLocal, Overflow, Section
from tuna_peft.feedback.settings import JudgeSettings, Size


class RankingTask(DataSource):
    """Pairwise accuracy on held-out ranked responses: does the model give better ones a higher log-probability?"""

    max_length: int | None = Field(
        None, ge=2, description="Maximum length of a prompt with one response, in tokens; null is the model's context."
    )
    overflow: Overflow = Field(
        "error",
        description="What to do with a response that exceeds `max_length`: stop with an `error`, `cut` its end, or "
        "`skip` it.",
    )
    margin: float = Field(
        0.1,
        ge=0,
        description="For the metric `margin_satisfaction`: required difference between two responses' "
        "length-normalized log-probabilities, for each step in rank.",
    )


class GradedTask(DataSource):
    """Mean grade of the model's greedy responses to held-out prompts, given by a Python function."""

    grader: str = Field(
        pattern=r"^[\w.-]+:[\w.-]+$",
        description="Function that grades a response between 0 and 1: `builtin:references`, `builtin:pico` or "
        "`module:function`.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Maximum length of a generated response, in tokens.")


class _Benchmark(Section):
    """Settings that the published benchmarks share."""

    wrap: bool = Field(
        True,
        description="Put each prompt of the benchmark into the recipe's prompt template as an instruction; false "
        "gives it to the model unchanged.",
    )


class SuperNITask(_Benchmark):
    """Super-NaturalInstructions, with the prompts and metrics of Tk-Instruct."""

    path: Annotated[str, MayBeLocal(required=True)] = Field(
        description="A checkout of allenai/natural-instructions, or a .jsonl file of instances."
    )
    tasks: list[str] | None = Field(None, description="Names of tasks; null is the benchmark's test tasks.")
    per_task: int = Field(100, ge=1, description="Use only the first N instances of each task.")
    shots: Annotated[list[Annotated[int, Field(ge=0, le=100)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0, 2],
        description="Numbers of positive examples in the prompt (few-shot); each number gets its own result.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Maximum length of a generated response, in tokens.")


class LMentryTask(_Benchmark):
    """LMentry: 25 elementary tasks and their robustness variants, scored by the benchmark's rules."""

    path: Annotated[str, MayBeLocal(required=True)] = Field(
        description="The benchmark's `data` folder, or a checkout of aviaefrat/lmentry."
    )
    tasks: list[str] | None = Field(None, description="Names of tasks or variants; null is all 41.")
    per_template: int | None = Field(
        None, ge=1, description="Use only the first N examples of each of a task's three templates; null is all."
    )
    first_sentence: bool = Field(
        False,
        description="Score only the first sentence of the first line, for models that do not stop by themselves.",
    )
    max_new_tokens: int = Field(50, ge=1, description="Maximum length of a generated response, in tokens.")


class VicunaTask(_Benchmark):
    """Vicuna QA: a judge compares the model's responses to open questions with another model's, in both orders."""

    path: Annotated[str, MayBeLocal(required=True)] = Field(
        description="FastChat's question.jsonl, with `question_id`, `text` and `category` in each line."
    )
    against: Annotated[str, MayBeLocal(only_file=True)] = Field(
        "base",
        description="What to compare with: a stage of the same model (for example `base`), or a file of answers in "
        "FastChat's format.",
    )
    judge: JudgeSettings = Field(description="The judge, see `tuna-peft judge`; it is asked in both orders.")
    max_new_tokens: int = Field(1024, ge=1, description="Maximum length of a generated response, in tokens.")


class LMEvalTask(Section):
    """Tasks of EleutherAI's lm-evaluation-harness; requires the extra `lm-eval`."""

    tasks: list[str] = Field(min_length=1, description="Names of the harness's tasks or groups.")
    include_path: Annotated[str | None, MayBeLocal(required=True)] = Field(
        None, description="Folder with your own task files."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Number of examples in the prompt (few-shot); null is each task's default."
    )
    limit: int | None = Field(None, ge=1, description="Use only the first N documents of each task; null is all.")


class TaskSettings(Section):
    """The tasks of an evaluation, by name."""

    ranking: RankingTask | None = Field(
        None, description="Held-out ranked responses: pairwise accuracy and related metrics."
    )
    graded: GradedTask | None = Field(None, description="Held-out prompts: mean grade by a Python function.")
    superni: SuperNITask | None = Field(None, description="Super-NaturalInstructions: ROUGE-L and exact match.")
    lmentry: LMentryTask | None = Field(None, description="LMentry: accuracy and robustness on elementary tasks.")
    vicuna: VicunaTask | None = Field(None, description="Vicuna QA: win rate according to a judge.")
    lm_eval: LMEvalTask | None = Field(None, description="Any tasks of EleutherAI's harness.")

    def given(self) -> dict[str, Section]:
        """The settings of the tasks that the recipe gives, by name."""
        return {name: task for name in type(self).model_fields if (task := getattr(self, name)) is not None}


class EvaluationSettings(Section):
    """What is measured before the first stage and after each stage."""

    tasks: TaskSettings = Field(default_factory=TaskSettings, description="The tasks, by name.")
    batch_size: Size = Field(
        "auto",
        description="Number of prompts per batch, halved when memory runs out; `auto` follows each task's lengths and "
        "the device's memory.",
    )


# Tags of the two kinds, see `recipe/feedback_schema.py`.
AUTOMATIC, NAMED = "<auto>", "<named>"


def _kind(data: Any) -> str:
    return AUTOMATIC if isinstance(data, str) else NAMED


Evaluation = Annotated[
    Annotated[Literal["auto"], Tag(AUTOMATIC)] | Annotated[EvaluationSettings, Tag(NAMED)], Discriminator(_kind)
]
"""The key `evaluation`: the user's own tasks, or `auto`, for which `run/held_out.py` holds prompts back."""

AUTO_ANSWERS, AUTO_NEW_TOKENS = 20, 128
"""With `auto`: maximum number of prompts that the model answers, and maximum length of an answer in tokens."""


def held_out_size(prompts: int, needed: int) -> int:
    """Number of prompts that `auto` holds back: 5 %, but 20 if there are 200, and 10 % of fewer.

    Args:
        prompts: Number of different prompts.
        needed: Number of prompts that training must keep.
    """
    return max(0, min(max(round(0.05 * prompts), min(20, prompts // 10)), prompts - needed))
