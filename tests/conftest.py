"""Settings for every test: no network, and one thread: tiny models gain nothing from more and wait on busy cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
