"""Tokenizers that llama.cpp cannot repeat are refused with the part that it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable

import gguf
import pytest
from llama_family import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuna_peft.errors import UserError
from tuna_peft.export.gguf.tokenizer import strips_after_special_tokens, write_tokenizer


def write(tokenizer: PreTrainedTokenizerFast, vocab_size: int = 500) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, "llama")
    write_tokenizer(writer, tokenizer, vocab_size, {})
    return writer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), "cuts text: Lowercase"),
        (lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()), "cuts text: Whitespace"),
        (
            lambda backend: setattr(
                backend,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(r"x+", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
                ),
            ),
            "cuts text: Split",
        ),
        (lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(True)), "cuts text: ByteLevel"),
        (lambda backend: setattr(backend.model, "ignore_merges", True), "ignore_merges=True"),
    ],
)
def test_refused(change: Callable[[Tokenizer], None], message: str) -> None:
    tokenizer = make_tokenizer("gpt2")
    change(tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=message):
        write(tokenizer)


def test_other_models_and_missing_rows_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    with pytest.raises(UserError, match="its model is WordLevel"):
        write(words)
    with pytest.raises(UserError, match=r"the tokenizer has 3\d\d tokens, the model 300"):
        write(make_tokenizer("llama3"), 300)


def test_nfc_is_let_through_and_scores_follow_the_merges() -> None:
    tokenizer = make_tokenizer("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    write(tokenizer)
    tokenizer = make_tokenizer("sentencepiece")
    [values] = write(tokenizer).kv_data
    texts, scores = values["tokenizer.ggml.tokens"].value, values["tokenizer.ggml.scores"].value
    scores_of = dict(zip(texts, scores, strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    assert [scores_of[text] for text in made] == [-float(rank) for rank in range(len(made))]
    assert min(scores) == -float(len(made))  # what no merge makes
    assert values["tokenizer.ggml.add_space_prefix"].value is True


def test_white_space_beside_special_tokens() -> None:
    assert strips_after_special_tokens(make_tokenizer("phi3"))
    assert not strips_after_special_tokens(make_tokenizer("llama3"))
    for options in ({"rstrip": True}, {"lstrip": True}):
        tokenizer = make_tokenizer("llama3")
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<x>", special=True, **options)]})
        with pytest.raises(UserError, match="white space beside '<x>' is a part of the token"):
            write(tokenizer)


def test_the_cut_of_phi_4_mini() -> None:
    [values] = write(make_tokenizer("phi4-mini")).kv_data
    assert values["tokenizer.ggml.pre"].value == "gpt-4o"
