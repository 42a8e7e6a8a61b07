"""What a recipe may say: one pydantic model per section.

Only pydantic is imported. The fields of `train` belong to trl's and our own trainer configurations; they are checked
in `train_fields.py`, which has to import them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tuna_peft.data.config import DataSource, MayBeLocal, Overflow, PromptConfig
from tuna_peft.recipe.evaluation_schema import EvaluationSettings
from tuna_peft.recipe.feedback_schema import FeedbackSource, StageData

StageType = Literal["sft", "ranking"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

# `base` is the key of the report for the model before any stage; PEFT gives `default` a meaning of its own.
RESERVED_STAGE_NAMES = ("default", "base")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BaseSettings(_Section):
    """The base model, frozen below all adapters."""

    model: Annotated[str, MayBeLocal()] = Field(description="A Hub id, a local path, or `builtin:pico-llama`.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub; null is the default branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Holds what is not quantised; `auto` is bf16 where the GPU has it, fp16 else, fp32 on CPU."
    )
    device: str = Field("auto", description="`auto` (the GPU when there is one), `cpu`, `cuda`.")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. Only for sources you trust."
    )

    @field_validator("device")
    @classmethod
    def _first_gpu(cls, device: str) -> str:
        if device not in ("auto", "cpu", "cuda", "cuda:0"):  # transformers' trainer takes the first
            raise ValueError("use auto, cpu or cuda; for the second GPU set CUDA_VISIBLE_DEVICES=1 before the command")
        return device


class QuantizationSettings(_Section):
    """How bitsandbytes stores the base's linear layers."""

    method: Literal["nf4", "fp4", "int8", "none"] = Field("nf4", description="`none` leaves the base unquantised.")
    double_quant: bool = Field(
        True, description="4-bit only: quantise the scales too (saves about 0.4 bit per weight)."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="4-bit only: dtype of the matrix products; `auto` follows `base.dtype`."
    )


class LoraSettings(_Section):
    """The adapter of a stage."""

    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: int = Field(
        32, ge=1, description="Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="`all-linear` (all but the head), or names such as [q_proj, v_proj]."
    )
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA: scale by alpha / sqrt(r).")


class LoraOverride(_Section):
    """Deviations of one stage from the recipe's `lora`; null inherits."""

    r: int | None = Field(None, ge=1, description="As `lora.r`, for this stage.")
    alpha: int | None = Field(None, ge=1, description="As `lora.alpha`, for this stage.")
    dropout: float | None = Field(None, ge=0, lt=1, description="As `lora.dropout`, for this stage.")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="As `lora.target_modules`, for this stage."
    )
    use_rslora: bool | None = Field(None, description="As `lora.use_rslora`, for this stage.")


class Stage(_Section):
    """One stage: its own adapter, trained on the frozen adapters of the stages before it."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Names the adapter and its folder: a-z, 0-9, _ and -.")
    type: StageType = Field(
        description="`sft` (supervised, TRL's SFTTrainer) or `ranking` (Tuna's loss, TunaTrainer)."
    )
    data: StageData = Field(
        description="The training data: a file, or for a ranking stage `{prompts, sample, score or judge}`."
    )
    rounds: int = Field(
        1,
        ge=1,
        description="Repeat sampling, ranking and training so often, each round with an adapter of its own, NAME-1, "
        "NAME-2 ..., that stands on those before and samples from them.",
    )
    continue_adapter: bool = Field(
        False,
        description="With `rounds`: train one adapter further in every round. NAME-2 starts as a copy of NAME-1 and "
        "takes its place in the stack.",
    )
    overflow: Overflow = Field(
        "error",
        description="A response beyond `train.max_length`: `error` stops, `cut` its end, `skip` it; all counted.",
    )
    lora: LoraOverride = Field(default_factory=LoraOverride, description="Deviations from the recipe's `lora`.")
    train: dict[str, Any] = Field(
        default_factory=dict, description="Fields of trl.SFTConfig (sft) or tuna_peft.TunaConfig (ranking)."
    )

    @property
    def feedback(self) -> FeedbackSource | None:
        """How the run makes the ranks; None where the data holds them."""
        return self.data if isinstance(self.data, FeedbackSource) else None

    @property
    def source(self) -> DataSource:
        """What is read: the training rows, or the prompts to rank responses for."""
        return self.data.prompts if isinstance(self.data, FeedbackSource) else self.data

    @property
    def round_names(self) -> list[str]:
        """The names of the adapters that the stage trains: its own, or one for each round."""
        if self.rounds == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(1, self.rounds + 1)]

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED_STAGE_NAMES:
            raise ValueError(f"a stage cannot be called `{name}`: the name has another meaning")
        return name

    @model_validator(mode="after")
    def _data_suit_the_type(self) -> Stage:
        if self.type == "sft" and self.feedback is not None:
            raise ValueError("a stage of type `sft` learns from a file; ranks are for `type: ranking`")
        if self.rounds > 1 and not (self.feedback and self.feedback.sample):
            raise ValueError("`rounds` repeats sampling, so its `data` needs `sample`")
        if self.continue_adapter and self.rounds == 1:
            raise ValueError("`continue_adapter` goes on with the adapter of the round before: it needs `rounds` > 1")
        return self


# Earlier versions wrote `dequantised` into recipes and run folders.
MergeBase = Annotated[
    Literal["dequantized", "original"],
    BeforeValidator(
        lambda value: "dequantized" if value == "dequantised" else value,
        json_schema_input_type=Literal["dequantized", "dequantised", "original"],
    ),
]


class MergeSettings(_Section):
    """The merged model."""

    enabled: bool = Field(True, description="Write a merged model at the end of the run.")
    dtype: Literal["bfloat16", "float16", "float32", "nf4"] = Field(
        "bfloat16", description="Dtype of the merged weights; `nf4` quantises them again."
    )
    base: MergeBase = Field(
        "dequantized",
        description="The weights to add the adapters to: the quantized ones that the adapters were trained on "
        "(`dequantized`, or in British spelling `dequantised`), or those of the original checkpoint.",
    )


class PushSettings(_Section):
    """What is published on the Hugging Face Hub at the end of the run, as by `tuna-peft push`."""

    repo: str = Field(
        pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$",
        description="NAME or ORGANISATION/NAME; created if it does not exist.",
    )
    what: Literal["adapters", "merged", "gguf"] = Field("adapters", description="The stack, or one of the exports.")
    private: bool = Field(True, description="Of a repository that is created; false publishes for everybody.")
    revision: str | None = Field(None, description="A branch, created if it does not exist; null is the main one.")
    pull_request: bool = Field(False, description="Open a pull request instead of committing.")
    base_id: str | None = Field(None, description="What the base is called on the Hub, where `base.model` is a path.")
    license: str | None = Field(None, description="Identifier for the model card; null takes the base's, if known.")
    data_license: str | None = Field(None, description="Of the training data, for the model card.")


class ExportSettings(_Section):
    """What a run leaves behind besides its stack of adapters."""

    combine: bool = Field(True, description="Write the stack as one adapter that plain PEFT loads.")
    combine_rank: int | None = Field(
        None, ge=1, description="Compress that adapter to this rank; null is exact: the ranks add up."
    )
    merge: MergeSettings = Field(default_factory=MergeSettings, description="The merged model.")
    divergence_prompts: int = Field(
        16, ge=0, description="Prompts on which the KL divergence of each export to the live stack is measured."
    )
    gguf: list[GGUFType] = Field(
        default_factory=list, description="GGUF files of the merged model to write, for example [q8_0, q4_0]."
    )
    push: PushSettings | None = Field(None, description="What to publish on the Hub; null publishes nothing.")

    @model_validator(mode="after")
    def _sources_are_written(self) -> ExportSettings:
        if self.gguf and not (self.merge.enabled and self.merge.dtype != "nf4"):
            raise ValueError("`gguf` is made of the merged model: it needs `merge` enabled, in 16 or 32 bits")
        if self.push and self.push.what == "merged" and not self.merge.enabled:
            raise ValueError("`push` of the merged model needs `merge` enabled")
        if self.push and self.push.what == "gguf" and not self.gguf:
            raise ValueError("`push` of GGUF files needs types in `gguf`")
        return self


class Recipe(_Section):
    """A whole run: base, quantisation, prompts, adapters, the stages in order, evaluation, export."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run; its default folder is runs/NAME."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds adapters, order of data and dropout, of every stage.")
    base: BaseSettings = Field(description="The base model.")
    quantization: QuantizationSettings = Field(
        default_factory=QuantizationSettings, description="How the base is quantised."
    )
    prompt: PromptConfig = Field(
        default_factory=PromptConfig, description="How instruction and input become a prompt."
    )
    lora: LoraSettings = Field(
        default_factory=LoraSettings, description="The adapters, unless a stage says otherwise."
    )
    stages: list[Stage] = Field(min_length=1, description="The stages in order; each stands on those before it.")
    evaluation: EvaluationSettings | None = Field(None, description="What to measure; null measures nothing.")
    export: ExportSettings = Field(default_factory=ExportSettings, description="What to write at the end.")

    @field_validator("stages")
    @classmethod
    def _stage_names_are_unique(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each stage needs a name of its own; given twice: {', '.join(twice)}")
        return stages

    @field_validator("stages")
    @classmethod
    def _samples_come_from_earlier_stages(cls, stages: list[Stage]) -> list[Stage]:
        taken, earlier = ["base"], ["base"]
        for stage in stages:
            sample = stage.feedback.sample if stage.feedback else None
            if sample and sample.from_stage is not None and sample.from_stage not in earlier:
                raise ValueError(
                    f"stage `{stage.name}` samples from `{sample.from_stage}`, which is none of those before it "
                    f"({', '.join(earlier)})"
                )
            taken += stage.round_names
            # Of rounds that continue one adapter only the last is in the stack at the end.
            earlier += stage.round_names[-1:] if stage.continue_adapter else stage.round_names
        if twice := sorted({name for name in taken if taken.count(name) > 1}):
            raise ValueError(f"rounds are named by stage and number; given twice: {', '.join(twice)}")
        return stages

    def sources(self) -> dict[tuple[str | int, ...], Any]:
        """Everything in the recipe that has a `path`, data sets and benchmarks, by its path of keys."""
        found: dict[tuple[str | int, ...], Any] = {}
        for index, stage in enumerate(self.stages):
            key = ("stages", index, "data")
            found[(*key, "prompts") if stage.feedback else key] = stage.source
        if self.evaluation is not None:
            for name, task in self.evaluation.tasks.given().items():
                if hasattr(task, "path"):
                    found["evaluation", "tasks", name] = task
        return found
