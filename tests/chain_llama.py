"""A LLaMA that answers every prompt with the same sentence: a tiny judge with a known answer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_chain(folder: Path, sentence: str, context: int = 8192) -> str:
    """Saves a model whose next token depends on the last one only: word by word through `sentence`, then EOS.

    Attention and MLP add nothing, embeddings are one-hot, and the head says which token follows which. What is no word
    of the sentence is followed by its first one.
    """
    words = sentence.split(" ")
    assert len(set(words)) == len(words)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: 3 + i for i, word in enumerate(words)}
    size = len(vocabulary)
    width = -(-size // 8) * 8
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    follows = [3, 3, 3, *range(4, size), 2]
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()
        model.lm_head.weight[follows, range(size)] = 10.0  # columns of one-hot embeddings
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %} <s>"
    tokenizer.save_pretrained(folder)
    return str(folder)
