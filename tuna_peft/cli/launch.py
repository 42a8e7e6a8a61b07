"""`tuna-peft run --launch CONFIG`: the same command in several processes, started by accelerate."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def launch_run(config: Path, recipe: str, overrides: list[str], output: Path | None, *, dry_run: bool = False) -> int:
    """Starts `accelerate launch --config_file CONFIG -m tuna_peft run ...` and waits for it.

    Args:
        recipe, overrides: Loaded by the caller, so that one process reports a mistake and asks for consent.
        config: A file that `accelerate config` or a user wrote, or the name of one in `recipes/accelerate`.

    Returns:
        The exit code of that command.

    Raises:
        UserError: There is no such file, or it requests an unsupported DeepSpeed setup.
    """
    from tuna_peft.recipe.shipped import find_accelerate_config
    from tuna_peft.run.sharding import require_supported

    file = find_accelerate_config(config)
    require_supported(file)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["-m", "tuna_peft", "run", recipe, *overrides]
    command += ["--output", str(output)] if output else []
    command += ["--dry-run"] if dry_run else ["--yes"]
    process = subprocess.Popen(command)
    # Schedulers may send it to this process alone; Ctrl-C reaches all processes of a terminal.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the processes received Ctrl-C, too: they finish their step, save and end
