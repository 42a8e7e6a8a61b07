"""Training, scoring and generation on a GPU that computes nothing: devices, dtypes, and what makes a GPU wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

try:
    from played_gpu import CASES, MISTAKES
except ImportError:  # of PyTorch's, before 2.10
    CASES, MISTAKES = {}, {}

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or not sys.platform.startswith("linux") or not CASES,
    reason="plays CUDA to a PyTorch for CPUs, from 2.10 on, on Linux",
)


@pytest.fixture(scope="module")
def results():
    """What went wrong, by case; all in one process that is not this one."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here.parent, here)))
    command = [sys.executable, str(here / "played_gpu.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, results):
    assert not results[case], results[case]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, results):
    assert mistake in results[mistake]
