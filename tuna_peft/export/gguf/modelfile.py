"""The Ollama `Modelfile` beside a GGUF file, with the prompt of training as its template.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.files import write_text

MODELFILE = "Modelfile"
_PLACE = "\x00prompt\x00"


def write_modelfile(
    path: Path, file: str, tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any], adapter: str | None = None
) -> None:
    """Writes the Modelfile.

    Args:
        path: Where to.
        file: The model's GGUF file, relative to it.
        tokenizer: The model's tokenizer.
        prompt: The prompt template of training, as in a stack's manifest; empty when unknown: then the chat template
            that the GGUF file carries is left to decide.
        adapter: The GGUF adapter's file on top of the model, relative to it.
    """
    lines = [f"FROM ./{file}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    template = _go_template(tokenizer, prompt)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {_quoted(tokenizer.eos_token)}")
    write_text(path, "\n".join(lines) + "\n")


def _go_template(tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any]) -> str | None:
    """The prompt of training with `{{ .Prompt }}` for the instruction, in Go's template language."""
    if not prompt:
        return None
    text = PromptTemplate(PromptConfig.model_validate(prompt)).render(_PLACE)
    if not isinstance(text, str):
        rendered = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        text = str(rendered).removeprefix(tokenizer.bos_token or "")  # llama.cpp adds it
    before, _, after = text.partition(_PLACE)
    return f"{_escaped(before)}{{{{ .Prompt }}}}{_escaped(after)}"


def _escaped(text: str) -> str:
    """Literal text: neither Go nor the Modelfile's triple quotes find anything to interpret."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
