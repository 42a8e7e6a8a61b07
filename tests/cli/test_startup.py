"""What starting up loads. Speed itself is not asserted; that the slow libraries stay out is."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SLOW = ["torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "pandas", "matplotlib", "huggingface_hub"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["data", "inspect", "--help"],
        ["sample", "--help"],
        ["score", "--help"],
        ["judge", "--help"],
        ["chat", "--help"],
        ["recipes", "list"],
    ],
)
def test_help_and_recipes_load_no_slow_library(arguments):
    code = (
        "import sys; sys.argv = ['tuna-peft', *sys.argv[1:]]\n"
        "from tuna_peft.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('LOADED', [name for name in {SLOW} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_importing_the_package_loads_no_torch():
    modules = "tuna_peft, tuna_peft.limits, tuna_peft.recipe.load, tuna_peft.feedback.judge"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_runs_the_same():
    done = subprocess.run([sys.executable, "-m", "tuna_peft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tuna-peft ")


def test_sigterm_counts_as_ctrl_c(monkeypatch):
    """Schedulers send it some time before they kill; by default Python ends at once, and reports nothing."""
    from tuna_peft import cli

    monkeypatch.setattr("tuna_peft.cli.app.app", lambda **_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the handler was not replaced"))
    try:
        with pytest.raises(KeyboardInterrupt):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
