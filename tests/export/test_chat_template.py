"""The chat template of a merged model: token by token the prompt of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import Tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.data.texts import prompt_ids
from tuna_peft.export.chat_template import chat_template_of, for_llama_cpp
from tuna_peft.export.merge import merge_stack
from tuna_peft.models.base.load import resolve_model_path

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "llama2-7b"
PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca": ({"template": "alpaca"}, "\n\n### Input:\n"),
    "quickstart": (
        {
            "template": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
            "template_no_input": "### Instruction:\n{instruction}\n\n### Response:\n",
        },
        "\n\n### Input:\n",
    ),
    "odd characters": (
        {"template": "It's \\n a \"quote\" {{ x }} {% y %} é 🐟 <{instruction}> then <{input}>'\\"},
        "> then <",
    ),
}


def tokenizers() -> list[Any]:
    missing = pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}: the real data is not here")
    return [
        pytest.param(resolve_model_path("builtin:pico-llama"), id="pico"),
        pytest.param(str(REAL), id="llama2", marks=missing),
    ]


def served(tokenizer: PreTrainedTokenizerBase, *contents: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("path", tokenizers())
@pytest.mark.parametrize("name", PROMPTS)
def test_one_message_is_the_prompt_of_training(path: str, name: str) -> None:
    prompt, separator = PROMPTS[name]
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = chat_template_of(prompt, tokenizer)
    template = PromptTemplate(PromptConfig.model_validate(prompt))
    for instruction in ("Name three fruits.", "Two\n\nparagraphs with {input} and 'quotes'.", " spaces ", "line\n"):
        assert served(tokenizer, instruction) == prompt_ids(template.render(instruction), tokenizer)
        with_input = template.render(instruction, "apple, dog\npear")
        assert served(tokenizer, f"{instruction}{separator}apple, dog\npear") == prompt_ids(with_input, tokenizer)


def test_llama_cpp_writes_the_space_behind_bos_itself() -> None:
    assert for_llama_cpp("{{- bos_token + ' ' -}}\n{{- 'x' -}}") == "{{- bos_token -}}\n{{- 'x' -}}"
    for other in ("{{- bos_token -}}\n{{- 'x' -}}", "{{ bos_token + ' ' }}"):
        assert for_llama_cpp(other) == other


def test_further_turns_follow_with_the_end_of_each_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("builtin:pico-llama"))
    tokenizer.chat_template = chat_template_of({"template": "Q: {instruction}\nA:"}, tokenizer)
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", " b"), ("user", "c"))]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>Q: a\nA: b</s>Q: c\nA:"
    with pytest.raises(Exception, match="knows user and assistant messages only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages])


@pytest.mark.parametrize("prompt", [{}, {"template": "chat"}, {"template": "none"}])
def test_no_template_of_our_own_leaves_the_tokenizers(prompt: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("builtin:pico-llama"))
    assert chat_template_of(prompt, tokenizer) is None


def test_an_input_that_nothing_sets_apart_is_part_of_the_instruction() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("builtin:pico-llama"))
    tokenizer.chat_template = chat_template_of({"template": "{instruction}\n\n{input} ->"}, tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a\n\nb"}], tokenize=False)
    assert text == "<s>a\n\nb\n\n ->"


@pytest.mark.parametrize("home", ["none", "config", "jinja"])
def test_a_merged_model_carries_it_and_no_other(tiny: Tiny, tmp_path: Path, home: str) -> None:
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    if home == "config":
        file = base / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "the base's own"}))
        (base / "chat_template.json").write_text(json.dumps({"chat_template": "the base's own"}))
    elif home == "jinja":
        (base / "chat_template.jinja").write_text("the base's own")
    merge_stack(tiny.stack, tmp_path / "merged", base_model=str(base))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rendered = PromptTemplate(PromptConfig(template="alpaca")).render("w3 w4")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3 w4"}], tokenize=False) == rendered
    assert "the base's own" not in (tmp_path / "merged" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "merged" / "chat_template.json").exists()
