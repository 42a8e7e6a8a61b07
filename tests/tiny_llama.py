"""A LLaMA of 64 x 2 with random weights and a tokenizer, and stacks of random adapters on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tuna_peft.models.base.load import Base, load_base, make_quantization_config
from tuna_peft.models.stack.adapters import push_adapter
from tuna_peft.models.stack.files import save_stack

VOCABULARY = 96
PROMPTS = [[(7 * i + 3 * j) % (VOCABULARY - 3) + 3 for j in range(length)] for i, length in enumerate((24, 9, 17))]

# Two stages that differ in rank, alpha, targets and scaling convention.
SFT = {"r": 8, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
RANKING = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "target_modules": ["v_proj", "o_proj", "down_proj"],
    "rank_pattern": {"o_proj": 3},
    "alpha_pattern": {"layers.1.mlp.down_proj": 10},
}


@dataclass(frozen=True)
class Tiny:
    """Paths of a base and of a stack on it."""

    base: str
    stack: Path


def write_base(
    folder: Path, *, tied: bool = False, intermediate: int = 128, seed: int = 0, max_shard_size: str = "5GB"
) -> str:
    """Saves model, tokenizer and generation config like a downloaded checkpoint, in bf16, and returns its path."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # wide enough for distributions that a wrong weight would visibly change
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=7)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def load_tiny(path: str, method: str = "nf4", *, double_quant: bool = True) -> Base:
    """Loads a base on the CPU with the given quantization."""
    return load_base(
        path, quantization_config=make_quantization_config(method, double_quant=double_quant), device="cpu"
    )


def stack_on(base: Base, **adapters: dict[str, Any]) -> PeftModel:
    """Pushes adapters with random factors, large enough to matter, onto a base."""
    torch.manual_seed(1)
    model = base.model
    for name, config in adapters.items():
        model = push_adapter(model, name, LoraConfig(task_type="CAUSAL_LM", **config))
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter.data, std=0.05)
    return model.eval()


def write_stack(folder: Path, path: str, method: str = "nf4", *, double_quant: bool = True, **adapters: Any) -> Path:
    """Saves a stack of random adapters, by default `SFT` with `RANKING` on it, and returns its folder."""
    adapters = adapters or {"sft": SFT, "ranking": RANKING}
    save_stack(
        stack_on(load_tiny(path, method, double_quant=double_quant), **adapters), folder, {"template": "alpaca"}
    )
    return folder
