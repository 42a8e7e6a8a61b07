"""Kills runs with `kill -9` at moments drawn over all of their phases, and compares them with one that nothing stops.

    python tests/run/kill_sweep.py FOLDER KILLS SEED SCHEDULES

The process imports everything once and forks for each run, which is much faster than to start Python each time.
Nothing is computed before a fork, so each run has threads and random numbers of its own. `test_kill_sweep` calls it.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

SCHEDULES = [(kind, unit) for kind in ("constant", "linear", "cosine") for unit in ("steps", "epochs")]
# They differ by nature: times, memory, where a stage was resumed, and how many answers were in the journal already.
PER_PROCESS = {"seconds", "peak_memory_gib", "peak_rss_bytes", "resumed_from", "found", "asked", "environment",
               "train_runtime", "train_samples_per_second", "train_steps_per_second"}  # fmt: skip


def make_recipe(root: Path, kind: str, unit: str) -> Any:
    from tuna_peft.recipe.schema import Recipe

    train = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "gradient_checkpointing": False,
             "lr_scheduler_type": kind, "logging_steps": 3}  # fmt: skip
    if unit == "steps":
        train |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    else:
        train |= {"num_train_epochs": 3, "save_strategy": "epoch"}
    ranked = {"path": str(root / "ranked.jsonl")}
    sample = {"n": 3, "max_new_tokens": 4, "batch_size": 6, "max_similarity": 0.5}
    feedback = {"prompts": {**ranked, "limit": 8}, "sample": sample, "judge": {"function": "test_pipeline:grade"}}
    return Recipe.model_validate({
        "name": "sweep", "base": {"model": str(root / "base"), "device": "cpu"}, "lora": {"r": 4, "alpha": 8},
        "prompt": {"template": "{instruction} "},
        "stages": [{"name": "sft", "type": "sft", "data": {"path": str(root / "sft.json")}, "train": train},
                   {"name": "ranking", "type": "ranking", "data": feedback, "train": train}],
        "evaluation": {"tasks": {"ranking": {**ranked, "split": "train[:4]"},
                                 "graded": {**ranked, "split": "train[:4]", "grader": "test_pipeline:grade",
                                            "max_new_tokens": 4}}},
        "export": {"divergence_prompts": 2},
    })  # fmt: skip


def write_data(root: Path) -> None:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, 90)}" for _ in range(count))

    ranked = [{"id": str(i), "prompt": words(4) + " ", "completions": [words(3), words(2)], "scores": [1.0, 0.0]}
              for i in range(12)]  # fmt: skip
    (root / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    rows = [{"instruction": words(4), "input": "", "output": words(3)} for _ in range(4)]
    (root / "sft.json").write_text(json.dumps(rows))


def announce_phases(pipe: list[int]) -> None:
    """Makes the functions of a run write the phase that they begin, and the one that they return to, to `pipe[0]`."""
    from transformers import Trainer

    from tuna_peft.run import exports, pipeline, rank_samples

    phases = ["loading"]

    def say() -> None:
        os.write(pipe[0], f"{phases[-1]}\n".encode())

    def wrap(owner: Any, name: str, phase: Any) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            depth = len(phases)
            phases.append(phase(args))
            say()
            try:
                return real(*args, **kwargs)
            finally:
                del phases[depth:]
                say()

        setattr(owner, name, wrapped)

    wrap(pipeline, "_load_base", lambda args: "loading")
    wrap(pipeline, "_evaluate", lambda args: f"evaluation of {args[4]}")
    wrap(pipeline, "_finish_stage", lambda args: f"around {args[4].name}")
    wrap(pipeline, "train_stage", lambda args: f"training {args[4].name}")
    wrap(rank_samples, "_sample", lambda args: "sampling")
    wrap(rank_samples, "_rank", lambda args: "judging")
    wrap(exports, "combine_stack", lambda args: "combine")
    wrap(exports, "merge_stack", lambda args: "merge")
    wrap(exports, "check_exports", lambda args: "comparison of exports")
    wrap(pipeline, "write_report", lambda args: "report")

    save = Trainer._save_checkpoint

    def save_checkpoint(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.state.global_step >= self.state.max_steps:
            phases.append(phases[-1].replace("training", "last checkpoint to marker of"))
            say()

    Trainer._save_checkpoint = save_checkpoint


def start(recipe: Any, folder: Path, pipe: list[int]) -> tuple[int, int]:
    """Forks a run; its process id, and where its phases can be read."""
    from tuna_peft.run.pipeline import run_recipe

    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = 1
    try:
        pipe[0] = writer
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_recipe(recipe, folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def watch(child: int, reader: int, kill_in: list[str], delay: float) -> tuple[int, list[tuple[str, float]]]:
    """Waits for the end of a run, or kills it `delay` seconds after it has begun one of the phases `kill_in`.

    Returns:
        The exit status, and the phases with the times at which they began.
    """
    seen, due, rest = [("loading", time.monotonic())], None, b""
    if "loading" in kill_in:
        due = time.monotonic() + delay
    while True:
        ready, _, _ = select.select([reader], [], [], None if due is None else max(0.0, due - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        data = os.read(reader, 4096)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            seen.append((line.decode(), time.monotonic()))
            if due is None and seen[-1][0] in kill_in:
                due = time.monotonic() + delay
    os.close(reader)
    return os.waitpid(child, 0)[1], seen


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    result: dict[str, Any] = {"left": [str(path) for path in folder.rglob(".*.tmp")]}
    for pattern in ("stack/**/*", "combined/adapter*", "merged/*", "stages/*/*.jsonl", "evaluation/*.jsonl"):
        for file in folder.glob(pattern):
            if not file.is_file():
                continue
            data: Any = file.read_bytes()
            if file.suffix == ".jsonl":
                data = Counter(data.splitlines())  # parallel or repeated work may come in another order
            if file.name == "tuna_export.json":
                data = without(json.loads(data))
            result[str(file.relative_to(folder))] = data
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    result["metrics"] = [without(json.loads(line)) for line in lines]  # none twice, none lost, in order
    result["report"] = without(json.loads((folder / "report.json").read_text()))
    return result


def without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without(each) for key, each in value.items() if key not in PER_PROCESS}
    return [without(each) for each in value] if isinstance(value, list) else value


def sweep(root: Path, kills: int, seed: int, schedules: list[tuple[str, str]]) -> dict[str, Any]:
    """Kills `kills` times over runs of all `schedules`.

    Returns:
        `kills`: how many by phase; `runs`: for each schedule the kills of its run, and what differs in the end.
    """
    pipe, draw = [-1], random.Random(seed)
    announce_phases(pipe)
    by_phase: Counter[str] = Counter()
    runs = {}
    for number, (kind, unit) in enumerate(schedules):
        recipe = make_recipe(root, kind, unit)
        folder = root / f"{kind}-{unit}"
        straight = folder.with_name(folder.name + "-straight")
        status, seen = watch(*start(recipe, straight, pipe), [], 0.0)
        assert status == 0, straight.with_suffix(".log").read_text()
        lengths: dict[str, float] = {}
        for (phase, began), (_, ended) in zip(seen, [*seen[1:], ("", time.monotonic())], strict=True):
            lengths[phase] = lengths.get(phase, 0.0) + ended - began
        phases = [phase for phase in lengths if not phase.startswith("around")]
        count = kills * (number + 1) // len(schedules) - kills * number // len(schedules)
        planned = sorted(draw.sample(range(len(phases)), min(count, len(phases))) +
                         [draw.randrange(len(phases)) for _ in range(count - len(phases))])  # fmt: skip
        landed, differing, expected = 0, set(), outcome(straight)
        for attempt in range(3 * count + 1):
            # The last attempt is not killed. Where a phase is over already, the kill comes in a later one.
            last = landed == count or attempt == 3 * count
            within = [] if last else phases[planned[landed] :]
            delay = 0.0 if last else draw.random() * lengths[within[0]]
            status, seen = watch(*start(recipe, folder, pipe), within, delay)
            if status:
                assert os.WIFSIGNALED(status), folder.with_suffix(".log").read_text()
                by_phase[seen[-1][0]] += 1
                landed += 1
                continue
            found = outcome(folder)
            differing |= {key for key in {*expected, *found} if expected.get(key) != found.get(key)}
            if last:
                break
            shutil.rmtree(folder)  # it ended before it was killed: the remaining kills need another run
        runs[folder.name] = {"kills": landed, "compared": len(expected), "differing": sorted(differing)}
        print(f"{folder.name}: {landed} kills, {len(expected)} compared, differing: {sorted(differing)}", flush=True)
    return {"kills": dict(by_phase), "runs": runs}


def main() -> None:
    root, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    schedules = [SCHEDULES[int(number)] for number in sys.argv[4].split(",")]
    print(json.dumps(sweep(root, kills, seed, schedules)))


if __name__ == "__main__":
    main()
