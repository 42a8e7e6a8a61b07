"""`tuna-peft run --launch CONFIG`: the same command in several processes, started by accelerate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# Seconds that the launcher gives its processes to finish a step and to save it, before it kills them. By default it
# gives them 30, and a step of a large model takes longer.
_SAVING_TIME = "600"


def launch_run(config: Path, recipe: str, overrides: list[str], output: Path | None, *, dry_run: bool = False) -> int:
    """Starts `accelerate launch --config_file CONFIG -m tuna_peft run ...` and waits for it.

    Args:
        recipe, overrides: Loaded by the caller, so that one process reports a mistake and asks for consent.
        config: A file that `accelerate config` or a user wrote, or the name of one in `recipes/accelerate`.

    Returns:
        The exit code of that command; 130, as for one process, where it was interrupted.

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
    process = subprocess.Popen(command, env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _SAVING_TIME, **os.environ})
    interrupted = False

    def stop(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        process.terminate()

    # Schedulers may send it to this process alone; Ctrl-C reaches all processes of a terminal.
    signal.signal(signal.SIGTERM, stop)
    while True:
        try:
            code = process.wait()
            return 130 if interrupted and code else code
        except KeyboardInterrupt:
            interrupted = True  # the processes received Ctrl-C, too: they finish their step, save and end
