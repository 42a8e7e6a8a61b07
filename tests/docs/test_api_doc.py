"""The guide in docs/api.md runs from the first block to the last; what it prints and logs is documented."""

import re
from pathlib import Path

import pytest
from logged_names import undocumented

DOC = Path(__file__).parents[2] / "docs" / "api.md"
TEXT = DOC.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The names that the code of the page has defined, and what it has printed."""
    printed: list[str] = []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guide"))
        for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(compile(code, str(DOC), "exec"), names)
    return names, printed


def test_its_outputs_are_those_on_the_page(guide):
    assert guide[1] == re.findall(r"```text\n(.*?)\n```", TEXT, re.DOTALL)
    assert guide[0]["second"].state.global_step == 5


def test_every_logged_name_is_documented(guide):
    logs = [entry for name in ("trainer", "second") for entry in guide[0][name].state.log_history]
    names = {key for entry in logs for key in entry}
    assert {"rank_loss", "grad_norm", "eval_ranking_accuracy", "train_runtime"} <= names
    assert undocumented(names) == []


def test_every_reference_is_named_in_plain_text():
    objects = re.findall(r"^::: [\w.]+\.(\w+)$", TEXT, re.MULTILINE)
    assert len(objects) > 10
    named = TEXT.split("## Reference\n")[1].split(":::")[0]
    assert [name for name in objects if f"`{name}`" not in named] == []
