"""A run in the terms of the arithmetic, and the device that it is on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuna_peft.limits import GIB, prompts_per_batch
from tuna_peft.planning.gpus import Gpu
from tuna_peft.planning.memory import Adapter, Precision, weight_parts
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.workload import ForwardPass, Workload, packed_pass, padded_pass
from tuna_peft.recipe.resolved import steps_per_epoch, total_steps


@dataclass(frozen=True)
class LocalModel:
    """A teacher or a judge, held beside the run's own model.

    Attributes:
        adapters: Parameters of its adapters.
        downloads: Whether it is on the Hub, and not in its cache yet.
    """

    name: str
    shape: ModelShape
    precision: Precision
    adapters: int = 0
    downloads: bool = True

    @property
    def is_unquantized(self) -> bool:
        """Whether it could be quantised; a stack's base stays as it was trained."""
        return self.precision.method == "none" and not self.adapters

    def in_4_bits(self) -> LocalModel:
        """Quantised, if it can be."""
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
    """Responses that the run's own model draws to the prompts of a stage.

    Attributes:
        n: To each prompt.
        new_tokens: Of each at most.
        batch_size: Responses at once.
        top_p: Whether the vocabulary is sorted for every token.
        draws: Of a prompt at most.
    """

    n: int
    new_tokens: int
    batch_size: int
    top_p: bool = False
    draws: int = 1

    @property
    def prompts_at_once(self) -> int:
        """Prompts in a batch."""
        return prompts_per_batch(self.batch_size, self.n)


@dataclass(frozen=True)
class TeacherSpec:
    """A model that scores the responses of a stage, at most `max_tokens` in a forward pass."""

    model: LocalModel
    max_tokens: int


@dataclass(frozen=True)
class JudgeSpec:
    """A model that is asked in words.

    Attributes:
        questions: Their lengths, as prompts.
        new_tokens: Of an answer at most.
        batch_size: Questions at once.
        greedy: Whether no answer is ever drawn.
    """

    model: LocalModel
    questions: Workload
    new_tokens: int
    batch_size: int
    greedy: bool = False


@dataclass(frozen=True)
class StageSpec:
    """A stage of training.

    Attributes:
        kind: `sft` or `ranking`.
        adapter: The one that it trains; those below it are frozen.
        activation_memory: As `TunaConfig` has it: `auto`, `full`, `none`, or GiB for kept activations.
        processes: GPUs that share the work.
        continues: Its adapter takes the place of the one of the stage before.
        section: What the recipe calls it; rounds of a stage share one.
        prompt_workload: Prompts, with the longest responses, of which the run makes the stage's rows.
        sample, teacher, judge: How it makes them, as far as it is done here.
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
    section: str = ""
    prompt_workload: Workload | None = None
    sample: SampleSpec | None = None
    teacher: TeacherSpec | None = None
    judge: JudgeSpec | None = None

    @property
    def largest_pass(self) -> ForwardPass:
        """The forward pass that decides about memory."""
        if self.kind == "sft":
            return padded_pass(self.workload.rows, self.batch_size)
        return packed_pass(self.workload.rows, self.batch_size, self.max_tokens)

    @property
    def smallest_pass(self) -> ForwardPass:
        """The longest row alone: a ranking step that runs out of memory is split down to it."""
        if self.kind == "sft":
            return self.largest_pass
        return packed_pass(self.workload.rows, 1, None)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return total_steps(self._steps_per_epoch, self.epochs, self.max_steps)

    @property
    def rows_seen(self) -> float:
        """Rows computed in the stage, repetitions included."""
        return self.workload.total * self.steps / self._steps_per_epoch

    @property
    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(self.workload.total, self.batch_size * self.processes, self.accumulation)

    @property
    def key(self) -> str:
        """What its overrides begin with."""
        return f"stages.{self.section or self.name}"


@dataclass(frozen=True)
class TaskSpec:
    """One thing that is measured: responses are scored, or `new_tokens` generated for each prompt, and judged."""

    workload: Workload
    new_tokens: int | None = None
    judge: JudgeSpec | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """What is measured of the base and after every stage."""

    batch_size: int
    tasks: dict[str, TaskSpec]


@dataclass(frozen=True)
class MergeSpec:
    """The merged model, written tensor by tensor, and GGUF files of it.

    Attributes:
        gguf: Types of the files.
    """

    bytes_per_parameter: float = 2.0
    gguf: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSpec:
    """A run as the arithmetic sees it.

    Attributes:
        compared: Tokens of each text on which exports are compared with the stack.
        downloads: Whether the base is on the Hub, and not in its cache yet.
        unplanned: What the recipe asks for besides, in words.
    """

    model: str
    shape: ModelShape
    precision: Precision
    stages: tuple[StageSpec, ...]
    evaluation: EvaluationSpec | None = None
    merge: MergeSpec | None = None
    compared: tuple[int, ...] = ()
    downloads: bool = True
    unplanned: tuple[str, ...] = ()

    def below(self, index: int) -> list[Adapter]:
        """The adapters under stage `index`."""
        return self.stack(index + 1)[:-1]

    def stack(self, count: int) -> list[Adapter]:
        """The adapters that the model holds after `count` stages."""
        adapters: list[Adapter] = []
        for stage in self.stages[:count]:
            if stage.continues:
                adapters.pop()
            adapters.append(stage.adapter)
        return adapters

    @property
    def helpers(self) -> list[LocalModel]:
        """All models beside its own, each once."""
        found = [one.model for stage in self.stages for one in (stage.teacher, stage.judge) if one]
        if self.evaluation is not None:
            found += [task.judge.model for task in self.evaluation.tasks.values() if task.judge]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Device:
    """Where the run happens.

    Attributes:
        name: For the reader.
        memory: Bytes that a program can have.
        gpu: Its data sheet; None for a CPU or an unknown card, whose speed is not predicted.
        cuda: Whether it is a GPU at all.
        bf16: Whether it has bf16 of its own.
    """

    name: str
    memory: float
    gpu: Gpu | None = None
    cuda: bool = True
    bf16: bool = True

    @classmethod
    def of(cls, gpu: Gpu) -> Device:
        """A card from the table."""
        return cls(gpu.name, gpu.memory_gib * GIB, gpu, bf16=gpu.bf16)
