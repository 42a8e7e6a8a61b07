"""The keys of a recipe: one pydantic model per section.

`recipe/load.py` validates a recipe file with `Recipe`; `recipe/resolved.py` turns its stages into what is run and
planned; the JSON schema and `docs/recipe-reference.md` are generated from the field descriptions. Only pydantic is
imported, so that a recipe is checked in milliseconds. The fields of `train` belong to the configurations of TRL's and
our own trainers; `recipe/train_fields.py` imports those and checks them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tuna_peft.data.config import DataSource, MayBeLocal, Overflow, PromptConfig, Section
from tuna_peft.recipe.evaluation_schema import Evaluation, EvaluationSettings
from tuna_peft.recipe.feedback_schema import FeedbackSource, StageData

StageType = Literal["sft", "ranking"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

# Reports use `base` for the model before any stage. `default` is the adapter name that PEFT uses if none is given, and
# PEFT saves that adapter in another folder than all others.
RESERVED_STAGE_NAMES = ("default", "base")


class BaseSettings(Section):
    """The base model. Its weights stay frozen; the stages train adapters on it."""

    model: Annotated[str, MayBeLocal()] = Field(description="A Hub id, a local path, or `builtin:pico-llama`.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub; null is the default branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the weights that are not quantized. `auto` is bf16 if the GPU supports it, else fp16; "
        "on a CPU bf16 where it is faster (AMX or AVX512-BF16, hidden size of 512 or more), else fp32. A run keeps "
        "the dtype that it began with.",
    )
    device: str = Field("auto", description="`cpu`, `cuda`, or `auto`: the GPU if there is one.")
    trust_remote_code: bool = Field(
        False, description="Run Python code from the model's repository. Only for sources you trust."
    )

    @field_validator("device")
    @classmethod
    def _first_gpu(cls, device: str) -> str:
        if device not in ("auto", "cpu", "cuda", "cuda:0"):  # transformers' Trainer always uses the first GPU
            raise ValueError("use auto, cpu or cuda; for the second GPU set CUDA_VISIBLE_DEVICES=1 before the command")
        return device


class QuantizationSettings(Section):
    """How bitsandbytes stores the base's linear layers."""

    method: Literal["nf4", "fp4", "int8", "none"] = Field("nf4", description="`none` leaves the base unquantized.")
    double_quant: bool = Field(
        True, description="4-bit only: quantize the scales too (saves about 0.4 bit per weight)."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="4-bit only: dtype of the matrix multiplications; `auto` is `base.dtype`."
    )


class LoraSettings(Section):
    """LoRA settings of the adapters."""

    r: int = Field(16, ge=1, le=2**16, description="Rank of the LoRA update.")
    alpha: int = Field(
        32, ge=1, description="Scaling: the update is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input during training.")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="Layers that get LoRA weights: `all-linear` (all linear layers but the output head), or names "
        "such as [q_proj, v_proj].",
    )
    use_rslora: bool = Field(False, description="Rank-stabilized LoRA: scale by alpha / sqrt(r).")
    start: Literal["zero", "below"] = Field(
        "zero",
        description="Where a new adapter starts: `zero` is LoRA's B = 0; `below` takes the largest components of the "
        "frozen adapters below and the same negated, which does not change the model either.",
    )


class LoraOverride(Section):
    """LoRA settings of one stage that override the recipe's `lora`; null keeps the recipe's value."""

    r: int | None = Field(None, ge=1, le=2**16, description="As `lora.r`, for this stage.")
    alpha: int | None = Field(None, ge=1, description="As `lora.alpha`, for this stage.")
    dropout: float | None = Field(None, ge=0, lt=1, description="As `lora.dropout`, for this stage.")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="As `lora.target_modules`, for this stage."
    )
    use_rslora: bool | None = Field(None, description="As `lora.use_rslora`, for this stage.")
    start: Literal["zero", "below"] | None = Field(None, description="As `lora.start`, for this stage.")


class Stage(Section):
    """One training stage: a new adapter, trained on top of the frozen adapters of the earlier stages."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Name of the adapter and its folder: a-z, 0-9, _ and -.")
    type: StageType = Field(
        description="`sft` (supervised, TRL's SFTTrainer) or `ranking` (Tuna's loss, TunaTrainer)."
    )
    data: StageData = Field(
        description="The training data: a data set; or prompts whose responses the run ranks itself, "
        "`{prompts, sample, score or judge}`. With `type: sft` the best response of each list is trained on."
    )
    rounds: int = Field(
        1,
        ge=1,
        le=1000,
        description="Number of times to repeat sampling, ranking and training. Each round trains its own adapter "
        "(NAME-1, NAME-2 ...) on top of the earlier ones and samples from the model of the round before.",
    )
    continue_adapter: bool = Field(
        False,
        description="Continue training the adapter of the stage before: this one starts as a copy of it and replaces "
        "it in the stack. With `rounds`, of the round before: NAME-2 replaces NAME-1.",
    )
    overflow: Overflow = Field(
        "error",
        description="What to do with a response that exceeds `train.max_length`: stop with an `error`, `cut` its end, "
        "or `skip` it. The report counts them.",
    )
    lora: LoraOverride = Field(default_factory=LoraOverride, description="Overrides of the recipe's `lora`.")
    train: dict[str, Any] = Field(
        default_factory=dict, description="Fields of trl.SFTConfig (sft) or tuna_peft.TunaConfig (ranking)."
    )

    @property
    def feedback(self) -> FeedbackSource | None:
        """How the run ranks the responses itself; None if the data has ranks already."""
        return self.data if isinstance(self.data, FeedbackSource) else None

    @property
    def source(self) -> DataSource:
        """The data set to read: the training examples, or the prompts whose responses the run ranks."""
        return self.data.prompts if isinstance(self.data, FeedbackSource) else self.data

    @property
    def round_names(self) -> list[str]:
        """Names of the adapters that the stage trains: the stage's name, or one name for each round."""
        if self.rounds == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(1, self.rounds + 1)]

    @property
    def continues_stage(self) -> bool:
        """Whether it continues the adapter of the stage before, not that of its own rounds."""
        return self.continue_adapter and self.rounds == 1

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED_STAGE_NAMES:
            raise ValueError(f"a stage cannot be called `{name}`: this name is reserved")
        return name

    @model_validator(mode="after")
    def _settings_suit_each_other(self) -> Stage:
        if self.rounds > 1 and not (self.feedback and self.feedback.sample):
            raise ValueError("`rounds` repeats sampling, so its `data` needs `sample`")
        if self.continue_adapter and self.train.get("reference") == "below":
            raise ValueError(
                "`reference: below` would compare with the stack below, which lacks what the adapter learnt before it "
                "was continued: remove it or `continue_adapter`"
            )
        return self


# Recipes and run folders of earlier versions have `dequantised`.
MergeBase = Annotated[
    Literal["dequantized", "original"],
    BeforeValidator(
        lambda value: "dequantized" if value == "dequantised" else value,
        json_schema_input_type=Literal["dequantized", "dequantised", "original"],
    ),
]


class MergeSettings(Section):
    """How the adapters are merged into the base."""

    enabled: bool = Field(True, description="Write a merged model at the end of the run.")
    dtype: Literal["bfloat16", "float16", "float32", "nf4", "int8"] = Field(
        "bfloat16", description="Dtype of the merged weights; `nf4` and `int8` quantize them again."
    )
    base: MergeBase = Field(
        "dequantized",
        description="The weights to add the adapters to: the quantized ones that the adapters were trained on "
        "(`dequantized`, or in British spelling `dequantised`), or those of the original checkpoint.",
    )


class PushSettings(Section):
    """What is published on the Hugging Face Hub at the end of the run; see `tuna-peft push`."""

    repo: str = Field(
        pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$",
        description="NAME or ORGANISATION/NAME; created if it does not exist.",
    )
    what: Literal["adapters", "merged", "gguf"] = Field(
        "adapters", description="What to publish: the stack of adapters, or one of the exports."
    )
    private: bool = Field(True, description="Visibility of a new repository; false makes it public.")
    revision: str | None = Field(None, description="Branch, created if it does not exist; null is the main branch.")
    pull_request: bool = Field(False, description="Open a pull request instead of committing.")
    base_id: str | None = Field(
        None, description="Hub id of the base; needed for adapters if `base.model` is a local path."
    )
    license: str | None = Field(None, description="License in the model card; null is the base's, if known.")
    data_license: str | None = Field(None, description="License of the training data, in the model card.")


class ExportSettings(Section):
    """What a run writes at its end besides the stack of adapters."""

    combine: bool = Field(True, description="Concatenate the stack into one adapter that PEFT can load by itself.")
    combine_rank: int | None = Field(
        None, ge=1, description="Compress that adapter to this rank; null is exact, with the sum of the stages' ranks."
    )
    merge: MergeSettings = Field(default_factory=MergeSettings, description="The merged model.")
    divergence_prompts: int = Field(
        16,
        ge=0,
        description="Number of prompts on which to measure the KL divergence between each export and the unmerged "
        "adapters.",
    )
    gguf: list[GGUFType] = Field(
        default_factory=list, description="Types of the GGUF files to write, for example [q8_0, q4_0]."
    )
    gguf_base: Literal["merged", "auto"] = Field(
        "merged",
        description="What GGUF files are made from: the merged model; or with `auto`, for each type, a model merged "
        "into the dequantized or the original base, whichever gives the file nearer to the unmerged adapters.",
    )
    push: PushSettings | None = Field(None, description="Publishing on the Hub; null publishes nothing.")

    @model_validator(mode="after")
    def _sources_are_written(self) -> ExportSettings:
        if self.gguf and not (self.merge.enabled and self.merge.dtype not in ("nf4", "int8")):
            raise ValueError("`gguf` converts the merged model: it needs `merge` enabled, in 16 or 32 bits")
        if self.gguf_base == "auto" and not (self.gguf and self.divergence_prompts):
            raise ValueError("`gguf_base: auto` needs types in `gguf`, and `divergence_prompts` to measure on")
        if self.push and self.push.what == "merged" and not self.merge.enabled:
            raise ValueError("`push` of the merged model needs `merge` enabled")
        if self.push and self.push.what == "gguf" and not self.gguf:
            raise ValueError("`push` of GGUF files needs types in `gguf`")
        return self


class Recipe(Section):
    """A whole run: base, quantization, prompts, adapters, the stages in order, evaluation, export."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run; its default output folder is runs/NAME."
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Random seed of every stage: initial weights of the adapter, data order, dropout, sampling.",
    )
    base: BaseSettings = Field(description="The base model.")
    quantization: QuantizationSettings = Field(
        default_factory=QuantizationSettings, description="How the base is quantized."
    )
    prompt: PromptConfig = Field(
        default_factory=PromptConfig, description="The prompt template for instruction and input."
    )
    lora: LoraSettings = Field(
        default_factory=LoraSettings, description="LoRA settings of all adapters; a stage can override them."
    )
    stages: list[Stage] = Field(min_length=1, description="The stages, in the order of training.")
    evaluation: Evaluation | None = Field(
        "auto",
        description="What to measure before the first stage and after each stage. `auto` holds back some prompts of "
        "the ranked lists (5 %, but 20 if there are 200, and 10 % of fewer), and measures pairwise accuracy, "
        "margin and length of the answers on them; null measures nothing and trains on all prompts.",
    )
    export: ExportSettings = Field(default_factory=ExportSettings, description="What to write at the end of the run.")

    @field_validator("stages")
    @classmethod
    def _stage_names_are_unique(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each stage needs a different name; given twice: {', '.join(twice)}")
        return stages

    @field_validator("stages")
    @classmethod
    def _samples_come_from_earlier_stages(cls, stages: list[Stage]) -> list[Stage]:
        taken, earlier = ["base"], ["base"]
        for stage in stages:
            sample = stage.feedback.sample if stage.feedback else None
            if sample and sample.from_stage is not None and sample.from_stage not in earlier:
                raise ValueError(
                    f"stage `{stage.name}` samples from `{sample.from_stage}`, which is not an earlier stage "
                    f"({', '.join(earlier)})"
                )
            taken += stage.round_names
            # Adapters that are continued are replaced: only the last one stays in the stack.
            if stage.continues_stage:
                earlier.pop()
            earlier += stage.round_names[-1:] if stage.continue_adapter else stage.round_names
        if twice := sorted({name for name in taken if taken.count(name) > 1}):
            raise ValueError(f"a round is named after its stage, with a number; given twice: {', '.join(twice)}")
        return stages

    @model_validator(mode="after")
    def _continued_adapters_are_alike(self) -> Recipe:
        settings = [self.lora.model_copy(update=stage.lora.model_dump(exclude_none=True)) for stage in self.stages]
        for index, stage in enumerate(self.stages):
            if stage.continues_stage and index == 0:
                raise ValueError(
                    f"stage `{stage.name}` has `continue_adapter`: it needs a stage before it, or `rounds` > 1"
                )
            if stage.continues_stage and settings[index] != settings[index - 1]:
                raise ValueError(
                    f"stage `{stage.name}` continues the adapter of `{self.stages[index - 1].name}`: "
                    "both need the same `lora`"
                )
        return self

    @property
    def named_evaluation(self) -> EvaluationSettings | None:
        """The tasks that the recipe names; None for `auto` and null."""
        return self.evaluation if isinstance(self.evaluation, EvaluationSettings) else None

    def sources(self) -> dict[tuple[str | int, ...], Any]:
        """All data sets and benchmarks of the recipe (whatever has a `path`), by their path of keys."""
        found: dict[tuple[str | int, ...], Any] = {}
        for index, stage in enumerate(self.stages):
            key = ("stages", index, "data")
            found[(*key, "prompts") if stage.feedback else key] = stage.source
        for name, task in (self.named_evaluation.tasks.given() if self.named_evaluation else {}).items():
            if hasattr(task, "path"):
                found["evaluation", "tasks", name] = task
        return found
