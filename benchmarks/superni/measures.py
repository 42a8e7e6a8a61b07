"""What is measured of a model: answers on seen and unseen tasks, KL to the base, ranking of real lists, LMentry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from benchmarks.superni.prepare import Prepared
from benchmarks.superni.sets import CHAT
from tuna_peft.data.config import DataSource
from tuna_peft.data.load import encode_source
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.evaluation.lmentry.rules import RULES
from tuna_peft.evaluation.lmentry.task import evaluate_lmentry, read_lmentry
from tuna_peft.evaluation.ranking import evaluate_ranking
from tuna_peft.evaluation.results import Metric
from tuna_peft.evaluation.session import Question, Session
from tuna_peft.evaluation.superni import evaluate_superni
from tuna_peft.journal import Journal
from tuna_peft.json_text import parse_json
from tuna_peft.models.forward.scoring import without_peft
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.models.stack.any_model import model_digest

Scores = dict[str, list[list[float]]]
"""By task: ROUGE-L, exact match, words, and whether the answer ended by itself, of each instance in a fixed order."""

_Result = TypeVar("_Result")
_COLUMNS = {"instruction": "instruction", "completions": "responses[].text", "scores": "responses[].score"}


class Measures:
    """Measures models on the held-out sets; answers are cached in the work folder.

    Args:
        prepared: Gives sets and sizes.
        data: Folder with `ranked/` and `lmentry/`; what it lacks is not measured.
    """

    def __init__(self, prepared: Prepared, data: Path):
        self.prepared, self.sizes, self.data = prepared, prepared.sizes, data

    def answers(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> Scores:
        """Scores of the greedy answers to the set `name`."""
        questions, limit = self._questions(name), self.sizes.greedy_tokens
        result = self._ask(
            model, tokenizer, lambda session: evaluate_superni(session, questions, shots=0, max_new_tokens=limit)
        )
        scores: Scores = defaultdict(list)
        for one in result.prompts:
            rouge, exact = one.scores["rouge_l"], one.scores["exact_match"]
            scores[str(one.group)].append(
                [round(rouge or 0.0, 2), exact or 0.0, len(one.response.split()), float(one.details["ended"])]
            )
        return dict(scores)

    def others(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """KL to the base in nats per token; pair accuracy and LMentry accuracy as `[value, low, high, count]`."""
        found: dict[str, Any] = {"kl": self._divergence(model, tokenizer)}
        file, folder = self.data / "ranked" / "alpaca_eval.jsonl", self.data / "lmentry"
        if file.is_file():
            rows = self._ranked(file, model, tokenizer)
            metrics = evaluate_ranking(model, tokenizer, rows, batch_size=2).metrics
            found["pair_accuracy"] = _listed(metrics["pair_accuracy"])
        if folder.is_dir():
            each = self.sizes.lmentry_per_template
            questions, _ = read_lmentry(folder, PromptTemplate(CHAT), list(RULES), each)
            metrics = self._ask(
                model, tokenizer, lambda session: evaluate_lmentry(session, questions, max_new_tokens=50)
            ).metrics
            found["lmentry"] = _listed(metrics["accuracy"])
        return found

    def _ask(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Callable[[Session], _Result],
        adapters: Sequence[str] | None = None,
    ) -> _Result:
        """What `task` makes of the answers of `model`, with these adapters or all."""
        with Journal(self.prepared.work / "journals" / "answers.jsonl") as journal:
            digest = model_digest(model, adapters)
            return task(Session(self.prepared.work, "superni", digest, model, tokenizer, journal))

    def _questions(self, name: str) -> list[Question]:
        lines = self.prepared.file(name).read_text(encoding="utf-8").splitlines()
        return [
            Question(one["id"], one["instruction"], [{"role": "user", "content": one["instruction"]}],
                     one["references"], one["task"], {"category": one["category"]})
            for one in map(parse_json, lines)
        ]  # fmt: skip

    @torch.no_grad()
    def _divergence(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
        """Mean KL(base || model) over the tokens of the base's greedy answers."""
        if without_peft(model) is model:
            return 0.0
        questions = self._questions("validation")[: self.sizes.divergence_prompts]
        limit = self.sizes.greedy_tokens
        with active_adapters(model, []):
            answers, _ = self._ask(model, tokenizer, lambda session: session.answers(questions, limit, "KL"), [])
        sums, tokens = 0.0, 0
        for answer in answers:
            assert answer.question.ids is not None
            own = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            own += [tokenizer.eos_token_id] * answer.ended
            ids = torch.tensor([answer.question.ids + own], device=next(model.parameters()).device)
            with active_adapters(model, []):
                base = _next_tokens(model, ids, len(own))
            found = _next_tokens(model, ids, len(own))
            sums += (base.exp() * (base - found)).sum().item()
            tokens += len(own)
        return sums / max(tokens, 1)

    def _ranked(self, file: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        source = DataSource.model_validate(
            {"path": str(file), "split": f"train[-{self.sizes.ranked_lists}:]", "columns": _COLUMNS,
             "on_bad_row": "skip"}
        )  # fmt: skip
        # Lenient: a few responses hold special tokens as text.
        prompt = CHAT.model_copy(update={"rendering": "lenient"})
        config = without_peft(model).config
        limit = self.sizes.ranked_tokens
        return encode_source(
            source,
            prompt,
            tokenizer,
            config,
            supervised=False,
            max_length=limit,
            overflow="cut",
            needs_reference=False,
        )[0]


def _next_tokens(model: torch.nn.Module, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Log-probabilities `(count, vocabulary)` before each of the last `count` tokens."""
    return model(input_ids=ids).logits[0, -count - 1 : -1].float().log_softmax(-1)


def _listed(metric: Metric) -> list[float | None]:
    return [metric.value, metric.low, metric.high, metric.count]
