"""Training, scoring and generation on a simulated GPU: devices, dtypes, and operations that make the CPU wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

try:
    from fake_cuda import CASES, MISTAKES
except ImportError:  # PyTorch before 2.10 lacks parts that fake_cuda.py imports
    CASES, MISTAKES = {}, {}

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or not sys.platform.startswith("linux") or not CASES,
    reason="simulates CUDA in a PyTorch built for CPUs, from 2.10 on, on Linux",
)


@pytest.fixture(scope="module")
def results():
    """`{case: traceback or ""}`; all cases run in one other process."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here.parent, here)))
    command = [sys.executable, str(here / "fake_cuda.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_on_a_simulated_gpu(case, results):
    assert not results[case], results[case]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, results):
    assert mistake in results[mistake]
