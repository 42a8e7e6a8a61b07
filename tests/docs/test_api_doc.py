"""The Python example of docs/api.md trains, on the built-in model."""

import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_python_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(DOC), "exec"), names)
    assert names["trainer"].state.global_step == 5
