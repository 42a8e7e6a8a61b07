"""Ollama's prompts are those of the chat template, token by token, over several turns and with a system message."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from chat_templates import GEMMA, LLAMA3, PUBLISHED, SMOLLM2
from gguf import GGUFWriter
from jinja2 import TemplateError
from llama_family import make_tokenizer
from ollama import TemplateFailure, render, template_of
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuna_peft.export.chat_template import chat_template_of
from tuna_peft.export.gguf.modelfile import write_modelfile
from tuna_peft.export.gguf.tokenizer import write_tokenizer

LLAMA2 = Path(__file__).parents[4] / "shared" / "data" / "tokenizers" / "llama2-7b"
SYSTEM = {"role": "system", "content": 'Be brief, and quote: """{{ .Prompt }}""" \\n'}
TALK = [
    {"role": role, "content": content}
    for role, content in zip(
        ["user", "assistant"] * 3,
        ["the cat {{ sat }}", "on the mat,\nand", "the dog's naïve café", "it's 1234", "### Input:\ndidn't", "no"],
        strict=True,
    )
]
ALPACA = {"template": "alpaca"}


def tokenizer_with(name: str, kind: str | None = None) -> PreTrainedTokenizerBase:
    """A small tokenizer with a published chat template and its special tokens."""
    template, own_kind, bos, eos, special, _ = PUBLISHED[name]
    tokenizer = make_tokenizer(kind or own_kind)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(text, special=True) for text in special]})
    tokenizer.bos_token, tokenizer.eos_token = bos or None, eos
    tokenizer.chat_template = template
    return tokenizer


def llama_cpp_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Mapping[str, Any], text: str) -> list[int]:
    """What llama.cpp makes of a text: BOS and spaces as the GGUF file says."""
    writer = GGUFWriter(None, "llama")
    write_tokenizer(writer, tokenizer, 40_000, prompt)
    [values] = writer.kv_data
    ids = [tokenizer.bos_token_id] if values["tokenizer.ggml.add_bos_token"].value else []
    if values["tokenizer.ggml.model"].value != "llama":
        return ids + tokenizer(text, add_special_tokens=False).input_ids
    # transformers puts it too where the normalizer does, before every text between special tokens.
    normalizer = tokenizer.backend_tokenizer.normalizer
    does_so_too = normalizer is not None and normalizer.normalize_str("x") == "▁x"
    puts_space = values["tokenizer.ggml.add_space_prefix"].value and not does_so_too
    added = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    assert tokenizer.unk_token in added
    for part in re.split(f"({'|'.join(map(re.escape, added))})", text):
        if part in added:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            encoded = tokenizer("<unk>" + (" " if puts_space else "") + part, add_special_tokens=False)
            ids += encoded.input_ids[1:]
    return ids


def check(tokenizer: PreTrainedTokenizerBase, prompt: dict[str, Any], folder: Path) -> None:
    """Compares every beginning of a conversation, without and with a system message."""
    template = chat_template_of(prompt, tokenizer) or tokenizer.chat_template
    write_modelfile(folder / "Modelfile", "m.gguf", tokenizer, prompt)
    ollama = template_of(folder / "Modelfile")
    assert ollama is not None
    for messages in (TALK[:1], TALK[:3], TALK[:5], [SYSTEM, *TALK[:1]], [SYSTEM, *TALK[:3]], [SYSTEM, *TALK[:5]]):
        try:
            expected = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, return_dict=False
            )
        except TemplateError:
            assert messages[0] is SYSTEM
            with pytest.raises(TemplateFailure, match="without system messages"):
                render(ollama, messages)
            continue
        assert llama_cpp_tokens(tokenizer, prompt, render(ollama, messages)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_chat_templates(name: str, tmp_path: Path) -> None:
    check(tokenizer_with(name), {"template": "chat"}, tmp_path)
    check(tokenizer_with(name), {}, tmp_path)


@pytest.mark.parametrize("name", ["llama-2", "mistral"])
def test_a_space_before_the_first_text_only(name: str, tmp_path: Path) -> None:
    check(tokenizer_with(name, "metaspace"), {"template": "chat"}, tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "gemma", "llama3", "qwen2"])
@pytest.mark.parametrize(
    "prompt", [ALPACA, {"template": '{{not go}} """ {instruction}'}, {"template": "{instruction}"}]
)
def test_templates_of_recipes(kind: str, prompt: dict[str, Any], tmp_path: Path) -> None:
    check(make_tokenizer(kind), prompt, tmp_path)


@pytest.mark.skipif(not LLAMA2.is_dir(), reason=f"no {LLAMA2}: the real data is not here")
@pytest.mark.parametrize("prompt", [ALPACA, {"template": "chat"}])
def test_the_real_llama_tokenizer_renders_turns(prompt: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLAMA2)
    tokenizer.chat_template = PUBLISHED["llama-2"][0]
    check(tokenizer, prompt, tmp_path)


def test_bos_is_left_out_only_where_llama_cpp_adds_it(tmp_path: Path) -> None:
    write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer_with("smollm2"), {"template": "chat"})
    assert render(template_of(tmp_path / "Modelfile") or "", TALK[:1]).startswith("<|im_start|>system\nYou are")
    write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer_with("llama-3"), {"template": "chat"})
    assert render(template_of(tmp_path / "Modelfile") or "", TALK[:1]).startswith("<|start_header_id|>user")


def test_a_chat_template_without_bos_switches_it_off() -> None:
    tokenizer = make_tokenizer("llama3")  # puts BOS before a text by itself, and its chat template writes none
    assert llama_cpp_tokens(tokenizer, {"template": "chat"}, "a") == tokenizer("a", add_special_tokens=False).input_ids
    assert llama_cpp_tokens(tokenizer, {}, "a") == tokenizer("a").input_ids


@pytest.mark.parametrize("name", PUBLISHED)
def test_generation_stops_at_the_end_of_a_turn(name: str, tmp_path: Path) -> None:
    write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer_with(name), {"template": "chat"})
    assert f'PARAMETER stop "{PUBLISHED[name][-1]}"\n' in (tmp_path / "Modelfile").read_text()


def test_full_prompts_are_separated_by_eos(tmp_path: Path) -> None:
    write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer_with("llama-3"), {"template": "none"})
    expected = f"{TALK[0]['content']}{TALK[1]['content']}<|eot_id|>{TALK[2]['content']}"
    assert render(template_of(tmp_path / "Modelfile") or "", TALK[:3]) == expected


@pytest.mark.parametrize(
    "template",
    [
        SMOLLM2.replace("system\nYou are", "system\n{{ strftime_now('%d %b %Y') }} You are"),
        LLAMA3.replace("message['content'] | trim", "message['content'] | upper"),
        GEMMA.replace("(first_user_prefix if loop.first else", "(loop.index | string if not loop.first else"),
    ],
    ids=["date", "changed content", "numbered turns"],
)
def test_no_template_where_ollama_cannot_repeat_it(
    template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = template
    write_modelfile(tmp_path / "Modelfile", "m.gguf", tokenizer, {"template": "chat"})
    assert (tmp_path / "Modelfile").read_text() == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
    assert "Ollama's language cannot repeat" in caplog.text


def test_an_adapter_lies_on_the_base_file(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = None
    write_modelfile(tmp_path / "Modelfile", "base.gguf", tokenizer, {}, adapter="a.gguf")
    assert (tmp_path / "Modelfile").read_text() == 'FROM ./base.gguf\nADAPTER ./a.gguf\nPARAMETER stop "</s>"\n'
