"""Samples several responses per prompt, and samples again at a higher temperature where they are too similar.

Used by `tuna-peft sample` and by stages with `data.sample`.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.ranked import Record
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.feedback.counts import Counts
from tuna_peft.feedback.diversity import similarities
from tuna_peft.feedback.server_sampler import ServerSampler
from tuna_peft.feedback.settings import SampleSettings
from tuna_peft.journal import Journal, content_key
from tuna_peft.models.generation.dense import has_room_for_dense
from tuna_peft.models.generation.generate import Generated, context_of, stream_responses
from tuna_peft.models.stack.any_model import model_digest


class Sampler(Protocol):
    """A model that responses are sampled from.

    Attributes:
        tokenizer: The model's tokenizer.
        identity: What the samples depend on besides prompt and settings, as plain JSON; part of the journal's keys.
        context: Maximum tokens of a prompt with its response; None for no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, Any]

    @property
    def context(self) -> int | None: ...

    def settle(self, journal: Journal) -> None:
        """Fixes for all who resume with this journal what depends on the machine's free memory."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SampleSettings,
        *,
        temperature: float,
        seed: str,
        done: Container[int],
    ) -> Iterator[Generated]:
        """Yields `settings.n` samples of every prompt whose index is not in `done`, prompt by prompt."""
        ...


class ModelSampler:
    """Samples from a loaded model, see `tuna_peft.models.generation.generate`.

    Args:
        adapters: Names of the active adapters; by default all.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, adapters: Sequence[str] | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self._dense: bool | None = None
        self.identity = {"backend": "transformers", **model_digest(model, adapters)}

    @property
    def context(self) -> int | None:
        """See `Sampler`."""
        return context_of(self.model)

    def settle(self, journal: Journal) -> None:
        """See `Sampler`."""
        self._dense = journal.settle("dense", has_room_for_dense(self.model), before=False)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SampleSettings,
        *,
        temperature: float,
        seed: str,
        done: Container[int],
    ) -> Iterator[Generated]:
        """See `Sampler`."""
        return stream_responses(
            self.model, self.tokenizer, prompts, n=settings.n, temperature=temperature, top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens, seed=seed, batch_size=settings.responses_at_once, done=done,
            dense=self._dense, description=f"sampling, temperature {temperature:g}",
        )  # fmt: skip


@dataclass
class SampleReport(Counts):
    """How many prompts have responses, and how they were sampled.

    Args:
        prompts: Number of prompts.
        kept: Number of prompts with at least two different responses.
        draws: Number of prompts, by the sampling attempts that they took.
        alike: Number of kept prompts whose responses are still too similar after the last attempt.
        responses: Number of responses kept.
        empty: Number of empty responses, which are dropped.
        repeated: Number of responses that repeat another one word for word, which are dropped.
        cut: Number of kept responses that were truncated.
        tokens: Tokens generated in all attempts, those before an interruption included.
        seconds: Duration of this call.
    """

    prompts: int = 0
    kept: int = 0
    draws: dict[str, int] = field(default_factory=dict)
    alike: int = 0
    responses: int = 0
    empty: int = 0
    repeated: int = 0
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """A summary for the terminal."""
        lines = [f"skipped: {count:,} prompts ({reason})" for reason, count in self.left_out.items()]
        again = sum(count for draws, count in self.draws.items() if draws != "1")
        lines += [f"sampled again: {again:,} prompts; still too similar: {self.alike:,}"] if again else []
        lines += [f"truncated: {self.cut:,} responses"] if self.cut else []
        dropped = self.empty + self.repeated
        lines += [f"dropped: {self.repeated:,} repeated and {self.empty:,} empty responses"] if dropped else []
        return lines


def sample_candidates(
    sampler: Sampler | ServerSampler,
    prompts: Sequence[Record],
    settings: SampleSettings,
    journal: Journal,
    *,
    seed: int | str = 0,
) -> tuple[list[Record], SampleReport]:
    """Samples several responses to each prompt.

    As in the paper (section 3.3 and its released code): if two responses to a prompt are too similar, all of them are
    sampled again at a higher temperature. After at most `trials` attempts the most diverse set is kept.

    Args:
        sampler: The model, or a server of it.
        prompts: `{"id", "prompt", "reference", "record"}`, see `tuna_peft.data.load.load_prompts`.
        settings: Number of responses, temperature, and required diversity.
        journal: Saves the samples of each prompt and attempt; what it has is not sampled again.
        seed: The random numbers depend on it, on the prompt's tokens and on the number of the attempt.

    Returns:
        Records as `tuna_peft.data.load.load_candidates` returns them (`id`, `prompt`, `completions`, `reference`,
        `record`), each with `sampling` (temperature, number of the attempt, similarity, and whether each response was
        truncated), in the order of the prompts; and the counts.

    Raises:
        UserError: No prompt has two different responses.
    """
    began, report = time.monotonic(), SampleReport(prompts=len(prompts))
    if not isinstance(sampler, ServerSampler):
        sampler.settle(journal)
    ids = [prompt_ids(prompt["prompt"], sampler.tokenizer, prompt.get("tools")) for prompt in prompts]
    limit = sampler.context or float("inf")
    pending = [index for index, tokens in enumerate(ids) if len(tokens) < limit]
    kept: dict[int, _Attempt] = {}
    for trial in range(settings.trials):
        temperature = round(settings.temperature + trial * settings.hotter_by, 6)
        left = [ids[index] for index in pending]
        rows = [prompts[index] for index in pending]
        attempts = _attempt_all(sampler, rows, left, settings, temperature, f"{seed}/{trial}", journal)
        for index, attempt in zip(pending, attempts, strict=True):
            report.tokens += sum(attempt.lengths)
            attempt.number = trial + 1
            attempt.alike = attempt.most_alike >= settings.max_similarity
            kept[index] = min(kept.get(index, attempt), attempt, key=lambda one: (one.alike, one.mean))
            kept[index].of = trial + 1
        pending = [index for index in pending if kept[index].alike]
        if not pending:
            break
    records = []
    for index, prompt in enumerate(prompts):
        if index not in kept:
            report.count_skipped("the prompt fills the model's context")
        elif (record := _candidates(prompt, kept[index], report)) is not None:
            records.append(record)
    report.seconds = round(time.monotonic() - began, 2)
    if not records:
        raise UserError(
            f"none of the {report.prompts} prompts has two different responses ({report.reasons()})",
            fix="Raise the temperature, or sample more responses per prompt.",
        )
    return records, report


@dataclass
class _Attempt:
    """The responses to one prompt from one attempt: number `number` of the `of` attempts that the prompt took."""

    texts: list[str]
    lengths: list[int]
    ended: list[bool]
    temperature: float
    alike: bool = False
    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        pairs = similarities(self.texts)
        self.most_alike, self.mean = max(pairs), sum(pairs) / len(pairs)


def _attempt_all(
    sampler: Sampler | ServerSampler,
    rows: list[Record],
    prompts: list[list[int]],
    settings: SampleSettings,
    temperature: float,
    seed: str,
    journal: Journal,
) -> list[_Attempt]:
    """One attempt for each prompt, from the journal or sampled now."""
    question = {
        "what": "sample", "model": sampler.identity, "n": settings.n, "temperature": temperature,
        "top_p": settings.top_p, "max_new_tokens": settings.max_new_tokens, "seed": seed,
    }  # fmt: skip
    keys = [content_key(**question, prompt=prompt) for prompt in prompts]
    if isinstance(sampler, ServerSampler):  # answers come in any order, from several threads
        asked = {key: (row, ids) for key, row, ids in zip(keys, rows, prompts, strict=True)}
        sampler.fill(journal, asked, settings, temperature=temperature, seed=seed)
        return [_Attempt(**journal[key], temperature=temperature) for key in keys]
    done = {place for place, key in enumerate(keys) if key in journal}
    for generated in sampler.sample(prompts, settings, temperature=temperature, seed=seed, done=done):
        if keys[generated.index] not in journal:  # two rows may have the same prompt
            values = {"texts": generated.texts, "lengths": generated.lengths, "ended": generated.ended}
            journal.add(keys[generated.index], values)
    return [_Attempt(**journal[key], temperature=temperature) for key in keys]


def _candidates(prompt: Record, attempt: _Attempt, report: SampleReport) -> Record | None:
    """The record of a prompt with its different responses; None if there are fewer than two, which is counted."""
    truncated: dict[str, bool] = {}
    for text, ended in zip(attempt.texts, attempt.ended, strict=True):
        if text:
            truncated.setdefault(text, not ended)
    empty = attempt.texts.count("")
    report.empty += empty
    report.repeated += len(attempt.texts) - empty - len(truncated)
    report.draws[str(attempt.of)] = report.draws.get(str(attempt.of), 0) + 1
    if len(truncated) < 2:
        report.count_skipped("all responses are equal" if truncated else "all responses are empty")
        return None
    report.kept += 1
    report.alike += attempt.alike
    report.responses += len(truncated)
    report.cut += sum(truncated.values())
    return {
        **{key: prompt[key] for key in ("id", "prompt", "reference", "record")},
        "completions": list(truncated),
        **({"tools": prompt["tools"]} if "tools" in prompt else {}),
        "sampling": {
            "temperature": attempt.temperature,
            "draw": attempt.number,
            "similarity": round(attempt.mean, 4),
            "cut": list(truncated.values()),
        },
    }
