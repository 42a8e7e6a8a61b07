"""Ollama's Modelfile repeats the prompt of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_family import make_tokenizer

from tuna_peft.export.gguf.modelfile import write_modelfile


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        ({"template": "none"}, 'TEMPLATE """{{ .Prompt }}"""\n'),
        (
            {"template": "Q: {instruction} {input}\nA:", "template_no_input": "Q: {instruction}\nA:"},
            'TEMPLATE """Q: {{ .Prompt }}\nA:"""\n',
        ),
        ({"template": "chat"}, 'TEMPLATE """<|user|>{{ .Prompt }}<|end|><|assistant|>"""\n'),
        (
            {"template": '{{not go}} """ {instruction}'},
            'TEMPLATE """{{ "{{" }}not go}} {{ "\\"\\"\\"" }} {{ .Prompt }}"""\n',
        ),
        ({}, ""),
    ],
)
def test_template(tmp_path: Path, prompt: dict[str, Any], template: str) -> None:
    write_modelfile(tmp_path / "Modelfile", "m.gguf", make_tokenizer("gpt2"), prompt)
    text = (tmp_path / "Modelfile").read_text()
    assert text == f'FROM ./m.gguf\n{template}PARAMETER stop "</s>"\n'
