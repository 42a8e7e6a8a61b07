"""Runs llama.cpp's `llama-quantize` for the types that only it writes: K-quants, with or without an importance matrix.

https://github.com/ggml-org/llama.cpp/tree/master/tools/quantize
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tuna_peft.errors import UserError

K_QUANTS = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq3_m", "iq4_xs", "iq4_nl",
)  # fmt: skip


def find_llama_quantize() -> str:
    """The path of the program.

    Raises:
        UserError: It is not on PATH.
    """
    found = shutil.which("llama-quantize")
    if found is None:
        raise UserError(
            "K-quants are written by llama.cpp's `llama-quantize`, which is not on PATH",
            fix="Install llama.cpp (brew, nix, winget, its GitHub releases), or export q4_0, q5_0 or q8_0.",
        )
    return found


def quantize(program: str, source: Path, target: Path, type: str, imatrix: str | os.PathLike[str] | None) -> None:
    """Writes `target` from a file in 16 or 32 bits.

    Raises:
        UserError: The program failed; the message has its last line of output.
    """
    options = [] if imatrix is None else ["--imatrix", os.fspath(imatrix)]
    done = subprocess.run(
        [program, *options, str(source), str(target), type.upper()], capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0 or not target.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"llama-quantize failed for {type}: {said}", where=program)
