"""Settings for every test, whatever the environment says: no network, an empty cache, a terminal of 80 columns.

One thread: tiny models gain nothing from more and wait on busy cores.
"""

import gc
import logging
import os
import sys
import tempfile

import pytest

_EMPTY = tempfile.TemporaryDirectory(prefix="tuna-peft-tests-")

for name in ("HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
os.environ["HF_HOME"] = _EMPTY.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "80"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if sys.__stdin__ is None:  # closed by whoever started the tests; IPython asks for its encoding
    sys.__stdin__ = open(os.devnull)  # noqa: SIM115 - as long as the tests run


def pytest_configure(config):
    """Hides GPUs, where equal bytes cannot be promised (attention's backward pass adds up in any order).

    `pytest -m gpu` runs the tests that need one, and only those.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    """Skips tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and `pytest -m gpu`")


def pytest_collection_finish():
    """Imported objects stay alive: freezing them makes the garbage collections of each training faster."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_of_the_package_as_before():
    """Commands and runs add handlers and set levels for the rest of their process; a test has them for itself."""
    logger = logging.getLogger("tuna_peft")
    before = logger.handlers[:], logger.level, logger.propagate, logger.disabled
    yield
    logger.handlers[:], level, logger.propagate, logger.disabled = before
    logger.setLevel(level)
