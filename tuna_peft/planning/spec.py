"""What the planner needs to know of a run, and of the device that it is on.

`from_recipe` makes these from a recipe; `plan` computes memory and time from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tuna_peft.limits import GIB, SMALL_MODEL, UNPLANNED_BATCH, prompts_per_batch
from tuna_peft.planning.gpus import Gpu
from tuna_peft.planning.memory import (
    CUDA_CONTEXT,
    PROCESS,
    Adapter,
    Precision,
    frozen_parts,
    trainer_parts,
    weight_parts,
)
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass, Workload, packed_pass, padded_pass
from tuna_peft.recipe.resolved import steps_per_epoch, total_steps


@dataclass(frozen=True)
class LocalModel:
    """A teacher or judge that is loaded beside the run's own model.

    Attributes:
        name: Hub id or path.
        shape: Its sizes.
        precision: How it is stored.
        adapters: Parameters of its adapters.
        downloads: Whether it must be downloaded first.
    """

    name: str
    shape: ModelShape
    precision: Precision
    adapters: int = 0
    downloads: bool = True

    @property
    def is_unquantized(self) -> bool:
        """Whether it may still be quantized; the base of trained adapters stays as it was in training."""
        return self.precision.method == "none" and not self.adapters

    def in_4_bits(self) -> LocalModel:
        """The same model in NF4; unchanged if it is quantized already."""
        if not self.is_unquantized:
            return self
        return replace(self, precision=replace(self.precision, method="nf4", double_quant=True))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of its weights, by part."""
        size = sum(weight_parts(self.shape, self.precision).values())
        size += (4.0 + self.precision.compute) * self.adapters
        method = self.precision.method
        stored = method if method != "none" else "16-bit" if self.precision.compute == 2 else "32-bit"
        return {f"{self.name}, {stored}": size}


@dataclass(frozen=True)
class SampleSpec:
    """Responses that the run's own model samples for the prompts of a stage.

    Attributes:
        n: Responses to each prompt.
        new_tokens: Maximum tokens of a response.
        batch_size: Responses that are generated at once.
        top_p: Whether nucleus sampling sorts the vocabulary for every token.
        attempts: Maximum number of times that a prompt is sampled.
        auto: Whether the batch size follows the memory, see `planning.sizes`.
    """

    n: int
    new_tokens: int
    batch_size: int
    top_p: bool = False
    attempts: int = 1
    auto: bool = False

    @property
    def prompts_at_once(self) -> int:
        """Prompts in a batch."""
        return prompts_per_batch(self.batch_size, self.n)


@dataclass(frozen=True)
class TeacherSpec:
    """A local model that scores the responses of a stage, at most `max_tokens` tokens in a forward pass.

    Attributes:
        auto: Whether `max_tokens` follows the memory, see `planning.sizes`.
    """

    model: LocalModel
    max_tokens: int
    auto: bool = False


@dataclass(frozen=True)
class JudgeSpec:
    """A local model that judges responses.

    Attributes:
        model: The judge.
        questions: Lengths of its prompts.
        new_tokens: Maximum tokens of an answer.
        batch_size: Questions in a batch.
        greedy: Whether every answer is decoded greedily, none sampled.
        auto: Whether the batch size follows the memory, see `planning.sizes`.
    """

    model: LocalModel
    questions: Workload
    new_tokens: int
    batch_size: int
    greedy: bool = False
    auto: bool = False


@dataclass(frozen=True)
class StageSpec:
    """A training stage.

    Attributes:
        name: Its name; the rounds of a stage have different ones.
        kind: `sft` or `ranking`.
        workload: Lengths of its training data.
        adapter: The adapter that it trains; those of earlier stages are frozen.
        batch_size: Examples in a forward pass of one process.
        accumulation: Forward passes in an optimizer step.
        max_tokens: Maximum tokens of a forward pass; None for no limit.
        activation_memory: As in `TunaConfig`: `auto`, `full`, `none`, or GiB for kept activations.
        optimizer: Its name in transformers.
        epochs: Passes over the training data.
        max_steps: Maximum optimizer steps; -1 for no limit.
        processes: GPUs that share each step.
        continues: Whether its adapter replaces that of the stage before.
        reference: Whether a pass without gradients over each example gives the reference of its loss.
        section: Name of its section in the recipe, which the rounds of a stage share.
        prompt_workload: Prompts that the run samples responses to, or whose responses it ranks; None if the training
            data is ranked already.
        sample, teacher, judge: Local models that make the training data.
        auto_tokens: Whether `max_tokens` follows the memory, see `planning.sizes`.
    """

    name: str
    kind: str
    workload: Workload
    adapter: Adapter
    batch_size: int
    accumulation: int
    max_tokens: int | None
    activation_memory: str | float
    optimizer: str
    epochs: float
    max_steps: int
    processes: int = 1
    continues: bool = False
    reference: bool = False
    section: str = ""
    prompt_workload: Workload | None = None
    sample: SampleSpec | None = None
    teacher: TeacherSpec | None = None
    judge: JudgeSpec | None = None
    auto_tokens: bool = False

    @property
    def largest_pass(self) -> ForwardPass:
        """The largest forward pass, which determines the memory."""
        if self.kind == "sft":
            return padded_pass(self.workload.rows, self.batch_size)
        return packed_pass(self.workload.rows, self.batch_size, self.max_tokens)

    @property
    def smallest_pass(self) -> ForwardPass:
        """The longest packed sequence by itself: a ranking step that runs out of memory is split down to it."""
        if self.kind == "sft":
            return self.largest_pass
        return packed_pass(self.workload.rows, 1, None)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return total_steps(self._steps_per_epoch, self.epochs, self.max_steps)

    @property
    def rows_seen(self) -> float:
        """Examples computed in the stage, over all epochs."""
        return self.workload.total * self.steps / self._steps_per_epoch

    @property
    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(self.workload.total, self.batch_size * self.processes, self.accumulation)

    @property
    def key(self) -> str:
        """Key of its section in the recipe, for overrides."""
        return f"stages.{self.section or self.name}"


@dataclass(frozen=True)
class TaskSpec:
    """An evaluation task: it scores responses, or generates `new_tokens` for each prompt and may have them judged.

    Attributes:
        batch_size: Number of prompts in a batch.
        auto: The batch size follows the memory, see `planning.sizes`.
    """

    workload: Workload
    new_tokens: int | None = None
    judge: JudgeSpec | None = None
    batch_size: int = UNPLANNED_BATCH
    auto: bool = False


@dataclass(frozen=True)
class MergeSpec:
    """The merged model, written tensor by tensor, and its GGUF files.

    Attributes:
        bytes_per_parameter: Bytes of a weight in the merged model.
        gguf: Types of the files.
    """

    bytes_per_parameter: float = 2.0
    gguf: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSpec:
    """All that the planner needs to know of a run.

    Attributes:
        model: Hub id or path of the base model.
        shape: Its sizes.
        precision: How it is stored.
        stages: The training stages, in order; the rounds of a stage count as stages.
        evaluation: The tasks on which the base and every stage are evaluated, by name.
        merge: The merged model, if one is exported.
        compared: Tokens of each text on which exports are compared with the unmerged adapters.
        downloads: Whether the base must be downloaded first.
        unplanned: Parts of the recipe that the plan does not cover, in words.
        export_notes: Exports that will be far from the trained adapters, in words.
    """

    model: str
    shape: ModelShape
    precision: Precision
    stages: tuple[StageSpec, ...]
    evaluation: dict[str, TaskSpec] = field(default_factory=dict)
    merge: MergeSpec | None = None
    compared: tuple[int, ...] = ()
    downloads: bool = True
    unplanned: tuple[str, ...] = ()
    export_notes: tuple[str, ...] = ()

    def below(self, index: int) -> list[Adapter]:
        """The frozen adapters that stage `index` is trained on top of."""
        return self.stack(index + 1)[:-1]

    def stack(self, count: int) -> list[Adapter]:
        """The adapters of the model after `count` stages."""
        adapters: list[Adapter] = []
        for stage in self.stages[:count]:
            if stage.continues:
                adapters.pop()
            adapters.append(stage.adapter)
        return adapters

    def weights(self, count: int) -> dict[str, float]:
        """Bytes of the base with the frozen adapters of the first `count` stages, by part."""
        return weight_parts(self.shape, self.precision) | frozen_parts(self.stack(count), self.precision)

    def trained_weights(self, index: int) -> dict[str, float]:
        """Bytes of weights, adapters, gradients and optimizer states while stage `index` trains, by part."""
        stage = self.stages[index]
        trained = trainer_parts(stage.adapter, self.below(index), stage.optimizer, self.precision)
        return weight_parts(self.shape, self.precision) | trained

    @property
    def helpers(self) -> list[LocalModel]:
        """All local teachers and judges, each once."""
        found = [one.model for stage in self.stages for one in (stage.teacher, stage.judge) if one]
        found += [task.judge.model for task in self.evaluation.values() if task.judge]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Device:
    """The device of a run.

    Attributes:
        name: Name for the reader.
        memory: Bytes that the run can use.
        gpu: The GPU's specifications; None for a CPU or an unknown GPU, whose speed is not predicted.
        cuda: Whether it is a GPU.
        bf16: Whether it supports bf16 natively; on a CPU, whether bf16 is faster than fp32 there.
        why: On a CPU, the reason.
    """

    name: str
    memory: float
    gpu: Gpu | None = None
    cuda: bool = True
    bf16: bool = True
    why: str = ""

    @property
    def overhead(self) -> float:
        """Bytes that are taken before any tensor: by CUDA, or by a Python process."""
        return CUDA_CONTEXT if self.cuda else PROCESS

    def free(self, fixed: float) -> float:
        """Bytes that are left beside `fixed` bytes of weights."""
        return self.memory - self.overhead - fixed

    def compute_bytes(self, shape: ModelShape) -> int:
        """Bytes of a number in the dtype that `auto` means for a model."""
        return 2 if self.cuda or (self.bf16 and shape.hidden >= SMALL_MODEL) else 4

    @classmethod
    def of(cls, gpu: Gpu) -> Device:
        """A known GPU."""
        return cls(gpu.name, gpu.memory_gib * GIB, gpu, bf16=gpu.bf16)
