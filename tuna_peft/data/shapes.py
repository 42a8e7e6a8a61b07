"""The shapes of public data sets, and how to read each of them. Used by `readers` for `format: auto`, and by name.

A shape is no reader of its own: it only stands for the settings that a recipe would give (`columns`, `group_by`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.columns import many
from tuna_peft.data.config import Columns, DataSource
from tuna_peft.data.ranked import Record


@dataclasses.dataclass(frozen=True)
class Shape:
    """How records with certain keys are read.

    Args:
        keys: Paths that a record of this shape has.
        columns: What `columns` in a recipe would say.
        group_by: What rows about the same prompt share, if they are collected.
        without: A key that a record of this shape does not have.
    """

    keys: tuple[str, ...]
    columns: dict[str, Any]
    group_by: str | None = None
    without: str | None = None

    def matches(self, record: Record) -> bool:
        """Whether a record (without its null values) has this shape."""
        try:
            for path in self.keys:
                many(record, path, "")
        except BadRow:
            return False
        return self.without not in record

    def apply(self, source: DataSource) -> DataSource:
        """The source with the settings of this shape; what it says itself about grouping stays."""
        group_by = self.group_by if source.group_by is None else source.group_by
        return source.model_copy(update={"columns": Columns.model_validate(self.columns), "group_by": group_by})


SHAPES: dict[str, Shape] = {
    # openbmb/UltraFeedback
    "ultrafeedback": Shape(
        ("instruction", "completions[].response", "completions[].overall_score"),
        {
            "instruction": "instruction",
            "completions": "completions[].response",
            "scores": "completions[].overall_score",
        },
    ),
    # NDCG-alignment/ListUltraFeedback
    "list-ultrafeedback": Shape(
        ("prompt", "all_responses", "overall_scores"),
        {"instruction": "prompt", "completions": "all_responses", "scores": "overall_scores"},
    ),
    # princeton-nlp/llama3-ultrafeedback-armorm and its siblings
    "scored-lists": Shape(
        ("prompt", "all_generated_responses", "all_rm_scores"),
        {"instruction": "prompt", "completions": "all_generated_responses", "scores": "all_rm_scores"},
    ),
    # berkeley-nest/Nectar; its prompts are whole transcripts
    "nectar": Shape(
        ("prompt", "answers[].answer", "answers[].rank"),
        {"prompt": "prompt", "completions": "answers[].answer", "ranks": "answers[].rank"},
    ),
    # nvidia/HelpSteer and HelpSteer2
    "helpsteer2": Shape(
        ("prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"),
        {"instruction": "prompt", "completions": "response", "scores": "helpfulness"},
        group_by="prompt",
    ),
    # nvidia/HelpSteer3, preference; from -3 (the first is much better) to 3
    "helpsteer3": Shape(
        ("context", "response1", "response2", "overall_preference"),
        {"prompt": "context", "completions": ["response1", "response2"], "strength": "overall_preference"},
        group_by="context",
    ),
    # stanfordnlp/SHP; the label respects the time of the comments, their votes do not
    "shp": Shape(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        {
            "instruction": "history",
            "completions": ["human_ref_A", "human_ref_B"],
            "winner": "labels",
            "winner_labels": {"1": 0, "0": 1},
        },
        group_by="history",
    ),
    # lmsys/chatbot_arena_conversations; the vote is on all turns
    "arena": Shape(
        ("conversation_a[].content", "conversation_b[].content", "winner"),
        {
            "instruction": "conversation_a[0].content",
            "completions": ["conversation_a", "conversation_b"],
            "winner": "winner",
        },
    ),
    # WeOpenML/PandaLM, the test set; 0 is a tie
    "pandalm": Shape(
        ("instruction", "input", "response1", "response2", "annotator1", "annotator2", "annotator3"),
        {
            "instruction": "instruction",
            "input": "input",
            "completions": ["response1", "response2"],
            "winner": ["annotator1", "annotator2", "annotator3"],
            "winner_labels": {"1": 0, "2": 1, "0": "tie"},
        },
    ),
    # NVIDIA NeMo-RL
    "nemo-rl": Shape(
        ("context", "completions[].completion", "completions[].rank"),
        {"prompt": "context", "completions": "completions[].completion", "ranks": "completions[].rank"},
    ),
    # OpenAI's preference fine-tuning
    "openai-preference": Shape(
        ("input.messages", "preferred_output", "non_preferred_output"),
        {
            "prompt": "input.messages",
            "completions": ["preferred_output", "non_preferred_output"],
            "ranks": "best_first",
        },
    ),
    # TRL's unpaired preference (KTO)
    "unpaired": Shape(
        ("prompt", "completion", "label"),
        {"prompt": "prompt", "completions": "completion", "scores": "label"},
        group_by="prompt",
    ),
    # Several responses with a label each. TRL's stepwise supervision has the same keys: steps of one response.
    "labels": Shape(
        ("prompt", "completions", "labels"),
        {"prompt": "prompt", "completions": "completions", "scores": "labels"},
    ),
    # TRL's prompt-completion, for supervised stages
    "prompt-completion": Shape(
        ("prompt", "completion"), {"prompt": "prompt", "completions": "completion"}, without="label"
    ),
}
