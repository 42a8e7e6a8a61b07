"""A stage's rows where the run ranks them itself: sample, then score or judge; each step goes on where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuna_peft.data.config import DataSource
from tuna_peft.data.ranked import Record
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.feedback.config import ScoreSettings
from tuna_peft.feedback.judge import Judging
from tuna_peft.feedback.judges import make_judge
from tuna_peft.feedback.sampling import ModelSampler, Sampler, sample_candidates
from tuna_peft.feedback.teacher import score_with_model
from tuna_peft.feedback.teacher_server import score_with_server
from tuna_peft.files import write_jsonl
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import Base
from tuna_peft.models.base.memory import free_memory
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.recipe.feedback_schema import FeedbackSource, StageSample
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.inputs import Inputs, encode_rows
from tuna_peft.run.samplers import vllm_sampler

logger = logging.getLogger("tuna_peft")

REPORT = "feedback.json"


def check_feedback(stage: ResolvedStage, rows: list[Record], tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known before anything is trained: the judge is there, and samples will fit.

    Raises:
        UserError: No such judge, or a prompt with the longest response is beyond `train.max_length`.
    """
    source, limit = stage.feedback, stage.max_length
    if source is not None and source.judge is not None:
        make_judge(source.judge)
    if source is None or source.sample is None or stage.overflow != "error" or limit is None:
        return
    longest = max(len(prompt_ids(row["prompt"], tokenizer)) for row in rows)
    needed = longest + source.sample.max_new_tokens + 1
    if needed > limit:
        raise UserError(
            f"prompts of up to {longest} tokens with responses of up to {source.sample.max_new_tokens} need {needed}, "
            f"and max_length is {limit}",
            where=stage.key,
            fix="Raise train.max_length, lower data.sample.max_new_tokens, or set overflow to `cut` or `skip`.",
        )


def is_ranked(run: RunDirectory, stage: str) -> bool:
    """Whether the rows of the stage are made."""
    return run.load(f"stages/{stage}/{REPORT}") is not None


def make_rows(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, inputs: Inputs, stage: ResolvedStage
) -> None:
    """Puts the encoded rows of `stage` into `inputs`, after sampling and ranking them if that is not done yet.

    `stages/<name>/` gets `samples.jsonl`, `ranked.jsonl`, the journals of both steps, and `feedback.json` with what
    was sampled, ranked and left out.

    Raises:
        UserError: Nothing is left to rank, or a server gives no answers.
    """
    source, folder = stage.feedback, run.stage_folder(stage.name)
    assert source is not None
    name = f"stages/{stage.name}/{REPORT}"
    if (report := run.load(name)) is None:
        report, rows = {}, inputs.prompts[stage.name]
        if source.sample is not None:
            rows, report["sample"] = _sample(run, model, base, stage, source.sample, rows)
            write_jsonl(folder / "samples.jsonl", rows)
        rows, ranking = _rank(source, rows, folder / "ranking.journal.jsonl", run.recipe.base.device)
        free_memory()  # a teacher's or judge's, for training
        report |= ranking
        write_jsonl(folder / "ranked.jsonl", rows)
        run.save(name, report)
    # A row that fits only nearly is counted: stopping here would lose what was sampled.
    ranked = DataSource(
        path=str(folder / "ranked.jsonl"), format="ranked", on_bad_row="skip",
        add_reference=stage.source.add_reference,
    )  # fmt: skip
    inputs.stages[stage.name], counts = encode_rows(
        stage, ranked, run.recipe.prompt, base.tokenizer, base.model.config
    )
    inputs.counts[stage.name] |= {**report, "training": counts}


def _sample(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, stage: ResolvedStage, sample: StageSample,
    prompts: list[Record],
) -> tuple[list[Record], dict[str, Any]]:  # fmt: skip
    names = list(stage.samples_from)
    logger.info("stage %s: sampling from %s", stage.name, " + ".join(names) or "the base")
    with (
        _sampler(run, model, base, sample, names) as sampler,
        Journal(run.stage_folder(stage.name) / "samples.journal.jsonl") as journal,
    ):
        rows, report = sample_candidates(sampler, prompts, sample, journal, seed=f"{run.recipe.seed}/{stage.name}")
    logger.info(
        "%d responses to %d prompts; %s", report.responses, report.kept, "; ".join(report.lines()) or "all kept"
    )
    return rows, report.as_dict()


@contextmanager
def _sampler(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, sample: StageSample, names: list[str]
) -> Iterator[Sampler]:
    """The run's model with the adapters `names`, or a vLLM engine with the same."""
    if sample.backend == "transformers":
        with active_adapters(model, names):
            yield ModelSampler(model, base.tokenizer, names)
        return
    settings = run.recipe.base
    place = str(run.path / "stack") if names else settings.model
    with vllm_sampler(
        place, names[-1] if names else None, quantization=run.recipe.quantization.method, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    ) as (sampler, _):  # fmt: skip
        yield sampler


def _rank(
    source: FeedbackSource, rows: list[Record], journal_path: Any, device: str
) -> tuple[list[Record], dict[str, Any]]:
    if source.judge is not None:
        with Journal(journal_path) as journal:
            judging = Judging(rows, source.judge, journal)
            ahead = judging.estimate()
            cost = f", for {ahead.cost:.2f} at most" if ahead.cost else ""
            logger.info("judging: %d questions%s; %d have their answer", ahead.requests, cost, ahead.found)
            ranked, judged = judging.records()
        logger.info("judged %d of %d prompts; left out: %s", judged.ranked, judged.rows, _reasons(judged.left_out))
        return ranked, {"judge": judged.as_dict()}
    assert source.score is not None
    with Journal(journal_path) as journal:
        ranked, scored = _score(source.score, rows, journal, device)
    logger.info("scored %d of %d prompts; left out: %s", scored.scored, scored.rows, _reasons(scored.left_out))
    return ranked, {"score": scored.as_dict()}


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in left_out.items()) or "none"


def _score(settings: ScoreSettings, rows: list[Record], journal: Journal, device: str) -> Any:
    if settings.server is not None:
        return score_with_server(rows, settings, journal)
    return score_with_model(rows, settings, journal, device=device)
