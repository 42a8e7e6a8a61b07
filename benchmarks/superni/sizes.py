"""How large the experiment is: the protocol's numbers, smaller ones for a slow CPU, tiny ones for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

SAMPLING_SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of data, training and measurement; the defaults are the protocol's.

    Attributes:
        tasks: Training tasks to use, in the order of their names; None for all.
        per_task: Instances of each training task by set, dealt out in this order.
        agreement_prompts: Prompts on which teachers are compared with the grader.
        unseen_per_task: Held-out instances of each test task.
        prompt_tokens, answer_tokens: Limits of training tasks' prompts and references; instances above are left out.
        unseen_prompt_tokens: Limit of test tasks' prompts.
        samples: Responses sampled for each prompt.
        sample_tokens, greedy_tokens: Maximum length of a sample and of a measured answer.
        epochs: Passes of the reference arm over the lists; its FLOPs are every other stage's budget.
        batch: Prompts in an optimizer step.
        rates: Learning rates of the first grid, lowest first; `lower` and `higher` extend it at its ends.
        seeds: Seeds of the leading arms.
        divergence_prompts: Validation prompts on whose answers the KL divergence is measured.
        ranked_lists: Lists of `ranked/alpaca_eval.jsonl` for pair accuracy.
        ranked_tokens: Their responses are truncated at this length, prompt included.
        lmentry_per_template: Examples of each template of LMentry's 25 core tasks.
    """

    tasks: int | None = None
    per_task: dict[str, int] = field(
        default_factory=lambda: {
            "seen": 4, "validation": 1, "agreement": 1, "contextual": 2, "probabilistic": 1, "sft": 1,
        }
    )  # fmt: skip
    agreement_prompts: int = 150
    unseen_per_task: int = 20
    prompt_tokens: int = 330
    answer_tokens: int = 50
    unseen_prompt_tokens: int = 1024
    samples: int = 8
    sample_tokens: int = 48
    greedy_tokens: int = 64
    epochs: int = 2
    batch: int = 8
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    lower: float | None = 3e-5
    higher: float | None = 3e-3
    seeds: int = 3
    divergence_prompts: int = 64
    ranked_lists: int = 60
    ranked_tokens: int = 512
    lmentry_per_template: int = 2


SMALL = Sizes(
    per_task={"seen": 2, "validation": 1, "agreement": 1, "contextual": 2, "probabilistic": 1, "sft": 1},
    unseen_per_task=10, samples=4, epochs=1, greedy_tokens=48, divergence_prompts=24, ranked_lists=20,
    lmentry_per_template=1,
)  # fmt: skip
CUT = Sizes(
    tasks=8,
    per_task={"seen": 1, "validation": 1, "agreement": 1, "contextual": 1, "probabilistic": 1, "sft": 1},
    agreement_prompts=4, unseen_per_task=1, prompt_tokens=150, unseen_prompt_tokens=150, samples=4, sample_tokens=12,
    greedy_tokens=8, epochs=4, batch=4, rates=(1e-3,), lower=None, higher=None, seeds=2, divergence_prompts=2,
    ranked_lists=2, ranked_tokens=128, lmentry_per_template=1,
)  # fmt: skip

SIZES = {"full": Sizes(), "small": SMALL, "cut": CUT}
SEARCH = ("rates", "lower", "higher", "seeds")
"""Fields that say which runs there are; no run depends on them."""
