"""Settings of data in a recipe: where it is, how to read it, and how its instructions become prompts.

Imports only pydantic, so that a recipe is checked in milliseconds.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

# What happens to a response beyond the longest length: stop, truncate it, or skip it.
Overflow = Literal["error", "cut", "skip"]

# What happens to text that a chat template changes.
Rendering = Literal["strict", "verbatim", "lenient"]

FormatName = Literal[
    "auto", "ranked", "teacher", "judge", "formatted", "alpaca", "preference", "transcript", "messages", "columns",
    # Public data sets, see `tuna_peft.data.shapes`.
    "ultrafeedback", "list-ultrafeedback", "nectar", "helpsteer2", "helpsteer3", "shp", "arena", "pandalm", "nemo-rl",
    "openai-preference", "scored-lists", "unpaired", "labels", "prompt-completion",
]  # fmt: skip

_PATH = re.compile(r"[^.\[\]]+(\[-?\d*\])*(\.[^.\[\]]+(\[-?\d*\])*)*")


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, and every number is finite and fits into 64 bits."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        # What reads it (torch, `itertools.islice`) would raise an OverflowError.
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and abs(one) >= 2**63:
                raise ValueError("this number is too large")
        return value


class Columns(Section):
    """The paths of the parts of a record, for `format: columns`.

    A path is a key, with dots for nested objects, `[]` for every entry of a list and `[2]` or `[-1]` for one entry:
    `responses[].text`, `messages[-1].content`. In a table a number is a column, counted from 1.
    """

    prompt: str | None = Field(None, description="Path of the full prompt (text or messages); no template is applied.")
    instruction: str | None = Field(None, description="Path of the instruction, which the prompt template wraps.")
    input: str | None = Field(None, description="Path of the input that goes with the instruction; null means none.")
    system: str | None = Field(
        None, description="Path of a system message before the prompt; null means none. Needs a prompt of messages."
    )
    completions: str | list[str] | None = Field(
        None, description="Path of the responses (`responses[].text`), or a list of paths with one response each."
    )
    scores: str | list[str] | dict[str, FiniteFloat] | None = Field(
        None,
        description="Path of the scores, higher is better (true counts 1, false 0), or a list of paths; or paths with "
        "weights, whose sum is the score: `{helpfulness: 0.7, verbosity: -0.3}`.",
    )
    ranks: str | list[str] | None = Field(
        None,
        description="Path of the ranks, lower is better, equal where tied, null where not ranked; or a list of paths; "
        "or `best_first`: the responses are in rank order already.",
    )
    winner: str | list[str] | None = Field(
        None,
        description="Path of the label of the best response, such as `model_a`, `B`, `2` or `tie`; a list of paths "
        "counts as several votes.",
    )
    winner_labels: dict[str, Annotated[int, Field(ge=0)] | Literal["tie"]] | None = Field(
        None,
        description="What the labels of `winner` mean: the index of the best response, from 0, or `tie`, for example "
        "`{1: 0, 2: 1, 0: tie}`.",
    )
    strength: str | dict[str, FiniteFloat] | None = Field(
        None,
        description="Path of a signed preference between two responses: below 0 the first is better, above 0 the "
        "second; its size is the difference of their scores. `{preference: -1}` turns the sign around.",
    )
    reference: str | None = Field(None, description="Path of the data set's original response; null means none.")
    id: str | None = Field(None, description="Path of the record's id. Default: its place in the file.")

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_paths(cls, value: Any) -> Any:
        """YAML reads the number of a column, or a label, as an integer."""
        if isinstance(value, dict):
            return {str(key) if isinstance(key, int) else key: entry for key, entry in value.items()}
        return [_column(entry) for entry in value] if isinstance(value, list) else _column(value)

    @field_validator("*")
    @classmethod
    def _paths_are_well_formed(cls, value: Any, info: ValidationInfo) -> Any:
        paths = [] if info.field_name == "winner_labels" else [value] if isinstance(value, str) else value or []
        for path in paths:
            if not _PATH.fullmatch(path):
                raise ValueError(
                    f"{path!r} is not a path; write for example `responses[].text` or `messages[-1].content`"
                )
        return value

    @model_validator(mode="after")
    def _parts_go_together(self) -> Columns:
        if (self.prompt is None) == (self.instruction is None):
            raise ValueError("give either `prompt` (used as it is) or `instruction` (wrapped by the prompt template)")
        if self.input is not None and self.instruction is None:
            raise ValueError("`input` goes with `instruction`, not with `prompt`")
        orders = [name for name in ("scores", "ranks", "winner", "strength") if getattr(self, name) is not None]
        if len(orders) > 1:
            raise ValueError(f"give {' or '.join(f'`{name}`' for name in orders)}, not both")
        if self.winner_labels is not None and self.winner is None:
            raise ValueError("`winner_labels` says what the labels of `winner` mean; give `winner` too")
        return self


def _column(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and not 0 < value < 2**31:
        raise ValueError("columns are counted from 1")
    return _text(value)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Markers(Section):
    """What stands before the turns of a transcript."""

    user: str = Field("Human:", min_length=1, description="Before each turn of the user, at the beginning of a line.")
    assistant: str = Field("Assistant:", min_length=1, description="Before each turn of the assistant.")


@dataclass(frozen=True)
class MayBeLocal:
    """Marks a setting that may be a local path; relative ones are also looked up in the folder of the recipe.

    Attributes:
        only_file: The path must be a file, or the setting is the name of a stage; a folder of that name is ignored.
        required: It can be nothing else, so the path must exist.
    """

    only_file: bool = False
    required: bool = False


class DataSource(Section):
    """One data set: its location, and how its records become prompts with ranked responses."""

    path: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
        MayBeLocal(),
    ] = Field(
        description="A .json, .jsonl, .csv, .tsv or .parquet file (also with .gz or .zst), the first sheet of an "
        ".xlsx or .ods file, a folder of such files or a pattern (`data/*.parquet`), a directory from "
        "`datasets.save_to_disk`, a Hub data set id, or "
        "`builtin:pico-llama/<file>` for the data inside the package; or a list of them, read one after the other.",
    )
    weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None,
        description="For a list of paths: mix them in these proportions, until one of them has no more records.",
    )
    format: FormatName = Field(
        "auto", description="Format of the records; `auto` detects it from the keys of the first record."
    )
    name: str | None = Field(None, description="Configuration (subset) of a Hub data set.")
    split: str = Field(
        "train",
        description="Split, with slices as in `datasets`: `train[:500]`, `train[90%:]`. "
        "A file has one split, called `train`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set.")
    streaming: bool = Field(
        False,
        description="Hub only: download only the first `limit` rows of the split, and keep them in the cache of "
        "`datasets`.",
    )
    header: bool = Field(True, description="CSV only: false if the first line is data; columns are then numbered.")
    columns: Columns | None = Field(None, description="The paths of the parts of a record, for `format: columns`.")
    group_by: str | list[str] | None = Field(
        None,
        description="Path of what rows about the same prompt share, or several: rows with one response each, or one "
        "comparison each, become one ranked list.",
    )
    markers: Markers | None = Field(
        None, description="Transcript format only: what stands before each turn. null: `Human:` and `Assistant:`."
    )
    add_reference: Literal["best", "worst"] | None = Field(
        None,
        description="Rank the `reference` response above (`best`) or below (`worst`) all others. "
        "null: use it only in the SFT loss term (`mle_on: reference`).",
    )
    length_penalty: float | None = Field(
        None,
        ge=0,
        description="Teacher format only: score = sum of token log-probabilities / length ** length_penalty; "
        "null is 1.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="What to do with an invalid record (no pair, empty response, NaN score ...): `error` stops, "
        "`skip` skips it and counts it in the report.",
    )
    limit: PositiveInt | None = Field(None, description="Maximum number of records to read (from the split).")

    @model_validator(mode="after")
    def _columns_match_the_format(self) -> DataSource:
        if self.format == "columns" and self.columns is None:
            raise ValueError("`format: columns` needs `columns`, for example `columns: {prompt: question, ...}`")
        if self.columns is not None and self.format not in ("columns", "auto"):
            raise ValueError(f"`columns` has no effect with `format: {self.format}`; use `format: columns`")
        return self

    @model_validator(mode="after")
    def _places_go_together(self) -> DataSource:
        if self.weights is not None and (isinstance(self.path, str) or len(self.path) != len(self.weights)):
            raise ValueError("`weights` needs a list of as many paths")
        if self.streaming and (self.limit is None or "[" in self.split or "+" in self.split):
            raise ValueError("`streaming` reads the first rows of one split: give `limit`, and no slice in `split`")
        return self

    @property
    def paths(self) -> list[str]:
        """The path, or all paths of a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def title(self) -> str:
        """The path or paths, for messages."""
        return ", ".join(self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")


class PromptConfig(Section):
    """How an instruction and its input become a prompt."""

    template: str = Field(
        "alpaca",
        description="`alpaca`, `chat` (the tokenizer's own chat template), `none` (the instruction is already a full "
        "prompt), or a text that contains `{instruction}` and optionally `{input}`. No template is applied to data "
        "with a `prompt` field, nor to the judge and formatted formats: they contain full prompts.",
    )
    template_no_input: str | None = Field(
        None, description="For a template text: the text to use, with `{instruction}`, when the input is empty."
    )
    rendering: Rendering = Field(
        "strict",
        description="What to do when the chat template changes a text. `strict`: an error, unless only white space is "
        "changed. `verbatim`: the response follows the generation prompt exactly as it is in the data, then the "
        "template's end of turn. `lenient`: train on what the template writes, and report the changes. Special tokens "
        "that are typed in a response are an error except with `lenient`.",
    )
    reasoning_loss: bool = Field(
        True,
        description="Whether reasoning at the beginning of a response, up to `</think>`, carries loss; `false` trains "
        "on and ranks by what comes after it.",
    )
    date: str | None = Field(
        None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="The date that a chat template with a date in it shows, as YYYY-MM-DD. null: the day on which the "
        "run started; the run and its stack keep it.",
    )

    @field_validator("date")
    @classmethod
    def _is_in_the_calendar(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.date.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _templates_have_their_fields(self) -> PromptConfig:
        custom = self.template not in ("alpaca", "chat", "none")
        if custom and "{instruction}" not in self.template:
            raise ValueError(
                f"template {self.template!r} is not `alpaca`, `chat` or `none`, and has no {{instruction}} in it"
            )
        if self.template_no_input is not None:
            if not custom:
                raise ValueError(f"`template_no_input` has no effect with `template: {self.template}`")
            if "{instruction}" not in self.template_no_input or "{input}" in self.template_no_input:
                raise ValueError("`template_no_input` needs {instruction} in it, and no {input}")
        return self
