"""Which prompts are held out: decided by a hash of the prompt alone.

Every writer of training text asks here and rejects what is held out, so a held-out prompt can appear in no
training text, whatever the seed, the order or the amount of generation.
"""

from __future__ import annotations

import hashlib

HELD_OUT_PERCENT = 10


def is_held_out(instruction: str, input: str) -> bool:
    """Whether the pair of instruction and input belongs to the held-out tenth of all prompts."""
    digest = hashlib.sha256(f"{instruction}\n\n{input}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT
