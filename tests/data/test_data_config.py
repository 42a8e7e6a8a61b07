"""What a recipe may say about data."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from tuna_peft.data.config import Columns, DataSource, PromptConfig


def test_every_field_is_described():
    for model in (DataSource, Columns, PromptConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "a", "fromat": "judge"}, "fromat"),
        ({"path": ""}, "at least 1 character"),
        ({"path": "a", "format": "columns"}, "needs `columns`"),
        ({"path": "a", "format": "judge", "columns": {"prompt": "p"}}, "no effect with `format: judge`"),
        ({"path": "a", "limit": 0}, "greater than 0"),
        ({"path": "a", "length_penalty": float("inf")}, "finite"),
        ({"path": "a", "columns": {"prompt": "p", "instruction": "i"}}, "either `prompt`"),
        ({"path": "a", "columns": {"completions": "c"}}, "either `prompt`"),
        ({"path": "a", "columns": {"prompt": "p", "input": "i"}}, "`input` goes with `instruction`"),
        ({"path": "a", "columns": {"prompt": "p", "scores": "s", "ranks": "r"}}, "not both"),
        ({"path": "a", "columns": {"prompt": "p", "completions": "a[.b"}}, "'a[.b' is not a path"),
        ({"path": "a", "columns": {"prompt": "p", "completions": ["a", "b[x]"]}}, "'b[x]' is not a path"),
    ],
)
def test_refused_sources(values, message):
    with pytest.raises(ValidationError) as caught:
        DataSource.model_validate(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "alpacca"}, "no {instruction} in it"),
        ({"template": "Q: {input}"}, "no {instruction} in it"),
        ({"template_no_input": "{instruction}"}, "no effect with `template: alpaca`"),
        ({"template": "{instruction}{input}", "template_no_input": "{input}{instruction}"}, "no {input}"),
        ({"date": "2026-02-30"}, "day is out of range"),
    ],
)
def test_refused_prompts(values, message):
    with pytest.raises(ValidationError) as caught:
        PromptConfig.model_validate(values)
    assert message in str(caught.value)


def test_the_data_package_imports_nothing_heavy():
    code = (
        "import sys\n"
        "import tuna_peft.data.config\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "import tuna_peft.data.load, tuna_peft.data.tokenize, tuna_peft.data.convert, tuna_peft.data.inspect\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
