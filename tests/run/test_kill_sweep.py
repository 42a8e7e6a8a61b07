"""A run that is killed with `kill -9` at any moment, again and again, ends as a run that nothing stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kill_sweep
import pytest
from tiny_llama import write_base

KILLS = 100


@pytest.mark.slow
def test_kills_in_all_phases_change_nothing(tmp_path):
    """Two processes, each with half of the schedules. The table is printed with `-s`."""
    root = tmp_path / "sweep"
    root.mkdir()
    write_base(root / "base")
    kill_sweep.write_data(root)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    halves = [
        subprocess.Popen(
            [sys.executable, str(Path(kill_sweep.__file__)), str(root), str(KILLS // 2), str(seed), numbers],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for seed, numbers in enumerate(("0,3,4", "1,2,5"))
    ]  # fmt: skip
    results = []
    for half in halves:
        output, _ = half.communicate()
        assert half.returncode == 0, output
        results.append(json.loads(output.splitlines()[-1]))
    kills = sum((Counter(result["kills"]) for result in results), Counter())
    runs = {name: run for result in results for name, run in result["runs"].items()}
    for phase, count in sorted(kills.items()):
        print(f"{phase:45}{count:4}")
    for name, run in runs.items():
        print(f"{name:45}{run['kills']:4} kills, {run['compared']} results compared")
    assert {name: run["differing"] for name, run in runs.items()} == dict.fromkeys(runs, [])
    assert len(runs) == len(kill_sweep.SCHEDULES) and sum(kills.values()) > 0.8 * KILLS
    phases = {"loading", "sampling", "judging", "combine", "merge", "report", "training sft", "training ranking",
              "evaluation of base", "evaluation of sft", "evaluation of ranking"}  # fmt: skip
    assert phases <= {*kills} and any(phase.startswith("last checkpoint") for phase in kills)
