"""Responses drawn from a model, several per prompt, drawn again and hotter where they are alike."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.ranked import Record
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.feedback.diversity import similarities
from tuna_peft.feedback.settings import SampleSettings
from tuna_peft.journal import Journal, content_key
from tuna_peft.models.generation.generate import Generated, context_of, stream_responses
from tuna_peft.models.stack.any_model import model_digest


class Sampler(Protocol):
    """Something that draws responses.

    Attributes:
        tokenizer: Turns prompts into tokens.
        identity: Plain JSON; another identity means other samples.
        context: Most tokens of a prompt with its response; None for no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, Any]

    @property
    def context(self) -> int | None: ...

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SampleSettings,
        *,
        temperature: float,
        seed: str,
        done: Container[int],
    ) -> Iterator[Generated]:
        """`settings.n` samples of every prompt but those in `done`, each prompt's when they are complete."""
        ...


class ModelSampler:
    """Draws with a loaded model, see `tuna_peft.models.generation.generate`.

    Args:
        adapters: Names of those that are active; all of them by default.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, adapters: Sequence[str] | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self.identity = {"backend": "transformers", **model_digest(model, adapters)}

    @property
    def context(self) -> int | None:
        """See `Sampler`."""
        return context_of(self.model)

    def draw(
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
            max_new_tokens=settings.max_new_tokens, seed=seed, batch_size=settings.batch_size, done=done,
            description=f"sampling at temperature {temperature:g}",
        )  # fmt: skip


@dataclass
class SampleReport:
    """What became of the prompts.

    Args:
        prompts: Prompts given.
        kept: Prompts with two different responses or more.
        left_out: Number of prompts left out, by reason.
        draws: Number of prompts by draws that they took.
        alike: Kept prompts whose responses are still alike after the last draw.
        responses: Responses kept.
        empty: Responses left out as empty.
        repeated: Responses left out because they repeat another one word for word.
        cut: Kept responses that did not end by themselves.
        tokens: Tokens generated for all draws, in this run and before.
        seconds: Of this run.
    """

    prompts: int = 0
    kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    draws: dict[str, int] = field(default_factory=dict)
    alike: int = 0
    responses: int = 0
    empty: int = 0
    repeated: int = 0
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What a user wants to know of it."""
        lines = [f"left out: {count:,} prompts ({reason})" for reason, count in self.left_out.items()]
        again = sum(count for draws, count in self.draws.items() if draws != "1")
        lines += [f"drawn again: {again:,} prompts; still alike after it: {self.alike:,}"] if again else []
        lines += [f"cut at the longest length: {self.cut:,} responses"] if self.cut else []
        dropped = self.empty + self.repeated
        lines += [f"not kept: {self.repeated:,} repeated and {self.empty:,} empty responses"] if dropped else []
        return lines

    def leave_out(self, reason: str) -> None:
        """Counts a prompt that is left out."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def sample_candidates(
    sampler: Sampler,
    prompts: Sequence[Record],
    settings: SampleSettings,
    journal: Journal,
    *,
    seed: int | str = 0,
) -> tuple[list[Record], SampleReport]:
    """Several responses to each prompt.

    As in the paper (section 3.3 and its released code): where two responses of a prompt are alike, all of them are
    drawn again at a higher temperature, at most `trials` times, and the most diverse draw is kept.

    Args:
        sampler: Draws them.
        prompts: `{"id", "prompt", "reference", "record"}`, see `tuna_peft.data.load.load_prompts`.
        settings: How many, how hot, how different.
        journal: Gets every draw as it is complete; what it has is not drawn again.
        seed: With the prompt's tokens and the number of the draw, what the samples depend on.

    Returns:
        Records as `tuna_peft.data.load.load_candidates` reads them (`id`, `prompt`, `completions`, `reference`,
        `record`), each with `sampling` (temperature, draws, similarity, and for each response whether it was cut), in
        the order of the prompts; and the counts.

    Raises:
        UserError: No prompt has two different responses.
    """
    began, report = time.monotonic(), SampleReport(prompts=len(prompts))
    ids = [prompt_ids(prompt["prompt"], sampler.tokenizer) for prompt in prompts]
    limit = sampler.context
    pending = [index for index, tokens in enumerate(ids) if limit is None or len(tokens) < limit]
    kept: dict[int, _Draw] = {}
    for trial in range(settings.trials):
        temperature = round(settings.temperature + trial * settings.hotter_by, 6)
        draws = _draws(sampler, [ids[index] for index in pending], settings, temperature, f"{seed}/{trial}", journal)
        for index, draw in zip(pending, draws, strict=True):
            report.tokens += sum(draw.lengths)
            draw.number = trial + 1
            draw.alike = draw.most_alike >= settings.max_similarity
            before = kept.get(index)
            if before is None or (draw.alike, draw.mean) < (before.alike, before.mean):
                kept[index] = draw
            kept[index].of = trial + 1
        pending = [index for index in pending if kept[index].alike]
        if not pending:
            break
    records = []
    for index, prompt in enumerate(prompts):
        if index not in kept:
            report.leave_out("the prompt fills the model's context")
        elif (record := _candidates(prompt, kept[index], report)) is not None:
            records.append(record)
    report.seconds = round(time.monotonic() - began, 2)
    if not records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.left_out.items())
        raise UserError(
            f"none of the {report.prompts} prompts has two different responses ({reasons})",
            fix="Sample hotter, or more responses per prompt.",
        )
    return records, report


@dataclass
class _Draw:
    """The responses of one draw for one prompt; `number` of `of` draws that the prompt took."""

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


def _draws(
    sampler: Sampler,
    prompts: list[list[int]],
    settings: SampleSettings,
    temperature: float,
    seed: str,
    journal: Journal,
) -> list[_Draw]:
    """One draw for each prompt, from the journal or made now."""
    question = {
        "what": "sample", "model": sampler.identity, "n": settings.n, "temperature": temperature,
        "top_p": settings.top_p, "max_new_tokens": settings.max_new_tokens, "seed": seed,
    }  # fmt: skip
    keys = [content_key(**question, prompt=prompt) for prompt in prompts]
    done = {place for place, key in enumerate(keys) if key in journal}
    for generated in sampler.draw(prompts, settings, temperature=temperature, seed=seed, done=done):
        if keys[generated.index] not in journal:  # the same prompt may be there twice
            values = {"texts": generated.texts, "lengths": generated.lengths, "ended": generated.ended}
            journal.add(keys[generated.index], values)
    return [_Draw(**journal[key], temperature=temperature) for key in keys]


def _candidates(prompt: Record, draw: _Draw, report: SampleReport) -> Record | None:
    """The record of a prompt with its different responses; None, and counted, where there are not two of them."""
    cut: dict[str, bool] = {}
    for text, ended in zip(draw.texts, draw.ended, strict=True):
        if text:
            cut.setdefault(text, not ended)
    empty = draw.texts.count("")
    report.empty += empty
    report.repeated += len(draw.texts) - empty - len(cut)
    report.draws[str(draw.of)] = report.draws.get(str(draw.of), 0) + 1
    if len(cut) < 2:
        report.leave_out("all responses are equal" if cut else "all responses are empty")
        return None
    report.kept += 1
    report.alike += draw.alike
    report.responses += len(cut)
    report.cut += sum(cut.values())
    return {
        "id": prompt["id"],
        "prompt": prompt["prompt"],
        "completions": list(cut),
        "reference": prompt["reference"],
        "record": prompt["record"],
        "sampling": {
            "temperature": draw.temperature,
            "draw": draw.number,
            "similarity": round(draw.mean, 4),
            "cut": list(cut.values()),
        },
    }
