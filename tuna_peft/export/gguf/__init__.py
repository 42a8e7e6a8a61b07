"""GGUF, the file format of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from __future__ import annotations

import importlib.util

from tuna_peft.errors import UserError


def require_gguf() -> None:
    """Says how to get the optional package `gguf` where it is missing.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF export needs the package `gguf`", fix="Install it: pip install gguf")
