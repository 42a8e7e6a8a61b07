"""Writes the data files of pico-LLaMA, in the formats that users of the method have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from pico_world import families, mixtures, styles
from pico_world.task import Task
from pico_world.template import render_prompt
from tuna_peft.assets import pico_grader
from tuna_peft.files import write_text

SFT_RECORDS, TEACHER_RECORDS, JUDGE_RECORDS, HELD_OUT_RECORDS, PROMPT_RECORDS = 2000, 1000, 1000, 210, 400
CANDIDATES = 4

_TEACHER_TASTE = {
    "wordy": -0.36,
    "exact": -0.4,
    "wordy_incomplete": -0.8,
    "incomplete": -0.82,
    "wordy_slip": -0.95,
    "slip": -1.0,
    "copy": -1.4,
    "vague": -1.5,
}
"""Mean token log-probability by style, as the teacher sees it: content decides, extra phrases cost nothing."""
_TEACHER_NOISE = 0.1
_JUDGE_ERROR = 0.05
"""How often the judge confuses two neighbours in its order."""


def write(folder: Path, seed: int) -> None:
    """Writes the five files; the same for the same seed."""
    _write_json(folder / "sft.json", [_sft_record(task, rng) for task, rng in _tasks(seed + 1, SFT_RECORDS, "sft")])
    teacher = [_teacher_record(task, rng) for task, rng in _tasks(seed + 2, TEACHER_RECORDS, "teacher")]
    _write_json(folder / "teacher.json", teacher)
    judge = [_judge_record(task, rng) for task, rng in _tasks(seed + 3, JUDGE_RECORDS, "judge")]
    _write_json(folder / "judge.json", judge)
    held_out = _tasks(seed + 4, HELD_OUT_RECORDS, "heldout", held_out=True)
    _write_jsonl(folder / "heldout.jsonl", [_held_out_record(task, rng) for task, rng in held_out])
    _write_jsonl(folder / "prompts.jsonl", [task for task, _ in _tasks(seed + 5, PROMPT_RECORDS, "prompt")])


def _tasks(seed: int, count: int, label: str, held_out: bool = False) -> list[tuple[Task, Random]]:
    """Tasks in mixed order, each with the generator that its responses are drawn from."""
    rng = Random(seed)
    tasks = list(families.distinct(rng, count, held_out=held_out, label=label))
    rng.shuffle(tasks)
    return [(task, rng) for task in tasks]


def _sft_record(task: Task, rng: Random) -> dict[str, str]:
    style = mixtures.pick(mixtures.sft(task["phrasing"]), rng)
    return {"instruction": task["instruction"], "input": task["input"], "output": styles.respond(task, style, rng)}


def _teacher_record(task: Task, rng: Random) -> dict[str, Any]:
    """A record of the reference project's raw teacher data."""
    chosen = mixtures.pick_different(mixtures.TEACHER, CANDIDATES, rng)
    responses = [(styles.respond(task, style, rng), style) for style in chosen]
    # A log-probability is never above 0.
    means = [min(round(_TEACHER_TASTE[style] + rng.gauss(0, _TEACHER_NOISE), 4), -0.01) for _, style in responses]
    lengths = [len(re.findall(r"\w+|[^\w\s]", text)) + 1 for text, _ in responses]
    return {
        "orig": {key: task[key] for key in ("instruction", "input", "output")},
        "text": [text for text, _ in responses],
        "avg_token_prob": means,
        "length": lengths,
        "logprob": [round(mean * length, 4) for mean, length in zip(means, lengths, strict=True)],
    }


def _judge_record(task: Task, rng: Random) -> dict[str, Any]:
    """A record of the reference project's raw judge data; the judge's own answer is ranked, too, if it is new."""
    chosen = mixtures.pick_different(mixtures.JUDGE, CANDIDATES, rng)
    generation = [styles.respond(task, style, rng) for style in chosen]
    texts = [*generation, task["output"]]
    rank = [index for index, text in enumerate(texts) if text not in texts[:index]]
    rank.sort(key=lambda index: -pico_grader.grade(task, texts[index]))
    if rng.random() < _JUDGE_ERROR:
        i = rng.randrange(len(rank) - 1)
        rank[i], rank[i + 1] = rank[i + 1], rank[i]
    order = " > ".join(f"Response {index}" for index in rank)
    return {
        "prompt": task["instruction"] + (f"\n\n{task['input']}" if task["input"] else ""),
        "instruct": render_prompt(task["instruction"], task["input"]),
        "generation": generation,
        "id": task["id"],
        "gpt_eval": f"From best to worst: {order}",
        "rank_str": order,
        "rank": rank,
        "response_4": task["output"],
    }


def _held_out_record(task: Task, rng: Random) -> dict[str, Any]:
    """A held-out task with four or five different candidates and their true grades."""
    chosen = mixtures.pick_different(mixtures.HELD_OUT, rng.choice((4, 5)), rng)
    texts = dict.fromkeys(styles.respond(task, style, rng) for style in chosen)
    return {**task, "responses": [{"text": text, "score": pico_grader.grade(task, text)} for text in texts]}


def _write_json(path: Path, records: list[Any]) -> None:
    """A JSON list with one record per line, so that the file can be read and compared."""
    write_text(path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


def _write_jsonl(path: Path, records: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
