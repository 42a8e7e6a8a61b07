"""The training data of a stage whose responses the run ranks itself: sample them, then rank by a teacher or a judge.

`tuna_peft.run.pipeline` calls `check_feedback` before anything is trained, and `rank_samples` and `read_ranked` when
the stage's turn comes. Each response and each ranking is saved in a journal at once, so an interrupted run resumes
where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuna_peft.data.ranked import Record
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.feedback.judge import Judging
from tuna_peft.feedback.judges import make_judge
from tuna_peft.feedback.sampling import ModelSampler, Sampler, sample_candidates
from tuna_peft.feedback.server_sampler import ServerSampler
from tuna_peft.feedback.teacher import score_with_model
from tuna_peft.feedback.teacher_check import check_teacher
from tuna_peft.feedback.teacher_server import score_with_server
from tuna_peft.files import write_jsonl
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import Base
from tuna_peft.models.base.memory import free_memory
from tuna_peft.recipe.feedback_schema import FeedbackSource, StageSample
from tuna_peft.recipe.resolved import ResolvedStage
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.inputs import RANKED, Inputs, encode_self_ranked
from tuna_peft.run.sample_server import exported_sampler
from tuna_peft.run.samplers import vllm_sampler

logger = logging.getLogger("tuna_peft")

REPORT = "feedback.json"


def check_feedback(
    stage: ResolvedStage, rows: list[Record], tokenizer: PreTrainedTokenizerBase, *, online: bool = True
) -> None:
    """Checks, before anything is trained, who ranks the responses, and that samples will fit into `train.max_length`.

    Args:
        rows: The prompts of the stage.
        online: Otherwise nothing is downloaded, and no function of the recipe is imported, as in a dry run.

    Raises:
        UserError: There is no such judge, or it gives no scores and the loss needs them; a teacher cannot read the
            prompts; or a prompt with a response of the maximum length exceeds `train.max_length`.
    """
    source, limit = stage.feedback, stage.max_length
    if source is None:
        return
    if source.judge is not None:
        if online or source.judge.function is None:
            make_judge(source.judge)
        if stage.needs_scores and source.judge.function is None:
            raise UserError(
                "the loss uses scores, and this judge gives only an order",
                where=f"{stage.key}.data.judge",
                fix="Use `function`, which gives scores, or a loss that needs ranks alone.",
            )
    if source.score is not None:
        check_teacher(rows, source.score, f"{stage.key}.data.score", online=online)
    if source.sample is None or stage.overflow != "error" or limit is None:
        return
    longest = max(len(prompt_ids(row["prompt"], tokenizer, row.get("tools"))) for row in rows)
    needed = longest + source.sample.max_new_tokens + 1
    if needed > limit:
        raise UserError(
            f"prompts of up to {longest} tokens with responses of up to {source.sample.max_new_tokens} need "
            f"{needed} tokens, and max_length is {limit}",
            where=stage.key,
            fix="Raise train.max_length, lower data.sample.max_new_tokens, or set overflow to `cut` or `skip`.",
        )


def is_ranked(run: RunDirectory, stage: str) -> bool:
    """Whether the responses of the stage are sampled and ranked already."""
    return run.load(f"stages/{stage}/{REPORT}") is not None


def rank_samples(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, inputs: Inputs, stage: ResolvedStage
) -> None:
    """Samples and ranks responses for `stage` unless that is done; only the first process of a run does.

    Writes to `stages/<name>/`: `samples.jsonl`, `ranked.jsonl`, the journals of both steps, and `feedback.json` with
    counts of what was sampled, ranked and skipped.

    Args:
        model: With the adapters active that the stage samples from.

    Raises:
        UserError: No prompt has responses that can be ranked, or a server does not answer.
    """
    source, folder = stage.feedback, run.stage_folder(stage.name)
    assert source is not None
    if is_ranked(run, stage.name):
        return
    report, rows = {}, inputs.prompts[stage.name]
    if source.sample is not None:
        rows, report["sample"] = _sample(run, model, base, stage, source.sample, rows)
        write_jsonl(folder / "samples.jsonl", rows)
    rows, ranking = _rank(source, rows, folder / "ranking.journal.jsonl", run.recipe.base.device)
    free_memory()  # the teacher's or judge's memory is needed for training
    write_jsonl(folder / RANKED, rows)
    run.save(f"stages/{stage.name}/{REPORT}", {**report, **ranking})


def read_ranked(run: RunDirectory, base: Base, inputs: Inputs, stage: ResolvedStage) -> None:
    """Adds to `inputs` the encoded examples that `rank_samples` has written."""
    file, report = run.stage_folder(stage.name) / RANKED, run.load(f"stages/{stage.name}/{REPORT}")
    assert report is not None
    counts = encode_self_ranked(inputs, stage, file, run.recipe.prompt, base.tokenizer, base.model.config)
    inputs.counts[stage.name] |= {**report, "training": counts}


def _sample(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, stage: ResolvedStage, sample: StageSample,
    prompts: list[Record],
) -> tuple[list[Record], dict[str, Any]]:  # fmt: skip
    names = list(stage.samples_from)
    logger.info("stage %s: sampling from %s", stage.name, " + ".join(names) or "the base")
    with (
        _sampler(run, model, base, stage, sample, prompts) as sampler,
        Journal(run.stage_folder(stage.name) / "samples.journal.jsonl") as journal,
    ):
        rows, report = sample_candidates(sampler, prompts, sample, journal, seed=f"{run.recipe.seed}/{stage.name}")
    logger.info(
        "%d responses to %d prompts; %s", report.responses, report.kept, "; ".join(report.lines()) or "none skipped"
    )
    return rows, report.as_dict()


@contextmanager
def _sampler(
    run: RunDirectory, model: PreTrainedModel | PeftModel, base: Base, stage: ResolvedStage, sample: StageSample,
    prompts: list[Record],
) -> Iterator[Sampler | ServerSampler]:  # fmt: skip
    """A sampler for the stage's model: the run's own model, a server of its export, or a vLLM engine."""
    names, settings = list(stage.samples_from), run.recipe.base
    if sample.server is not None:
        yield exported_sampler(run, model, base.tokenizer, stage, sample, sample.server, prompts)
        return
    if sample.backend == "transformers":
        yield ModelSampler(model, base.tokenizer, names)
        return
    served = str(run.path / "stack") if names else settings.model
    with vllm_sampler(
        served, names[-1] if names else None, quantization=run.recipe.quantization.method, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    ) as (sampler, _):  # fmt: skip
        yield sampler


def _rank(
    source: FeedbackSource, rows: list[Record], journal_path: Path, device: str
) -> tuple[list[Record], dict[str, Any]]:
    """Ranks the responses of each prompt by the judge or the teacher.

    Returns:
        The ranked records, and counts of what was ranked and skipped.
    """
    if source.judge is not None:
        with Journal(journal_path) as journal:
            judging = Judging(rows, source.judge, journal, device=device)
            estimate = judging.estimate()
            cost = f", at a cost of {estimate.cost:.2f} at most" if estimate.cost else ""
            logger.info("judging: %d questions%s; %d answers cached", estimate.requests, cost, estimate.found)
            ranked, judged = judging.records()
        logger.info("judged %d of %d prompts; skipped: %s", judged.ranked, judged.rows, _reasons(judged.left_out))
        return ranked, {"judge": judged.as_dict()}
    assert source.score is not None
    with Journal(journal_path) as journal:
        if source.score.server is not None:
            ranked, scored = score_with_server(rows, source.score, journal)
        else:
            ranked, scored = score_with_model(rows, source.score, journal, device=device)
    logger.info("scored %d of %d prompts; skipped: %s", scored.scored, scored.rows, _reasons(scored.left_out))
    return ranked, {"score": scored.as_dict()}


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in left_out.items()) or "none"
