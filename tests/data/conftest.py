"""A tiny tokenizer whose ids can be worked out by hand, files on the fly, and the real data where it is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

VOCAB = {
    token: index for index, token in enumerate(["<s>", "</s>", "?", "a", "b", "c", "d", "x", "y", "\n", "ab", "cd"])
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'x' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'y' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'y' }}{% endif %}"
)


def build_tokenizer(*, bos: bool = True, eos_suffix: bool = False, chat_template: str | None = None) -> Any:
    """Characters a b c d x y and newline, with the merges a+b and c+d; pad is EOS."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=VOCAB, merges=[("a", "b"), ("c", "d")], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * eos_suffix
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="?"
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer() -> Any:
    return build_tokenizer(chat_template=CHAT)


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    path = SHARED / "tokenizers" / "llama2-7b"
    if not path.is_dir():
        pytest.skip("needs the real LLaMA tokenizer in ../shared/data/tokenizers")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return SHARED


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes records as data.jsonl and gives its path."""

    def write(*records: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write
