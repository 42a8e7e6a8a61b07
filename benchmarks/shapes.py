"""The models of the benchmarks: LLaMA sizes with LoRA, with random NF4 weights or without weights on `meta`."""

from __future__ import annotations

from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from tuna_peft.models.base.dequantise import keep_quantised_layout
from tuna_peft.models.forward import fused_lora
from tuna_peft.models.forward.checkpointing import checkpoint_activations

LORA_RANK = 16
# Linear layers of all architectures in the benchmarks; Phi-3 has fewer, wider ones.
TARGETS = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]

# hidden, intermediate, layers, heads, key-value heads, vocabulary
_SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 97),
    "small": (512, 1408, 8, 8, 8, 32_000),
    "1b": (2048, 5632, 22, 32, 4, 32_000),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
    "13b": (5120, 13_824, 40, 40, 40, 32_000),
    "70b": (8192, 28_672, 80, 64, 8, 128_256),
}
SHAPES = tuple(_SHAPES)


def config_of(shape: str) -> LlamaConfig:
    """TinyLlama-1.1B, LLaMA-7B, Llama-3-8B, LLaMA-13B, or something that a CPU can run."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = _SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
        use_cache=False,
        pad_token_id=0,
    )


class MetaNF4Linear(torch.nn.Linear):
    """A frozen layer that makes a 16-bit copy of its weight in every forward and backward pass, as a 4-bit layer does.

    bitsandbytes has no kernels for the `meta` device. Here the stored weight is 16-bit too; the bytes of an NF4
    weight are computed by `flops.weight_bytes`, not taken from this layer.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta", dtype=dtype)
        self.register_parameter("packed", self._parameters.pop("weight"))

    def reset_parameters(self) -> None:
        """Does nothing: a `meta` tensor has no values."""

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The 16-bit copy."""
        return self.packed.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Dequantizing.apply(x, self.packed)


class _Dequantizing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, weight.clone())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.clone(), None


def build(
    shape: str | PretrainedConfig,
    device: str,
    *,
    quantize: bool = True,
    dtype: torch.dtype | None = None,
    frozen_adapters: int = 0,
) -> PeftModel:
    """A frozen base of the given size with LoRA r=16 on all linear layers of the decoder, in training mode.

    On `meta`, base and adapters are bf16: autocast does not exist there, and this avoids casts that a GPU would not
    make either. On CUDA the base computes in bf16; on CPU everything is fp32.

    Args:
        frozen_adapters: Adapters below the trained one.
    """
    config = config_of(shape) if isinstance(shape, str) else shape
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantize:
        _quantize(model, device)
    model.requires_grad_(False)
    keep_quantised_layout(model)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    fused_lora.register(lora)
    peft_model = get_peft_model(model, lora, "adapter0", autocast_adapter_dtype=device != "meta")
    names = [f"adapter{index}" for index in range(1 + frozen_adapters)]
    for name in names[1:]:
        peft_model.add_adapter(name, lora, autocast_adapter_dtype=device != "meta")
    cast(Any, peft_model.base_model).set_adapter(names)
    for name in names[:-1]:
        peft_model.set_requires_grad(name, False)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name and not parameter.is_meta:  # zeros would hide the gradient of lora_A
            torch.nn.init.normal_(parameter, std=0.02)
    peft_model.enable_input_require_grads()
    return peft_model.train()


def build_plain(config: PretrainedConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A frozen 16-bit model without adapters, like a teacher or a judge."""
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def set_checkpointing(model: PeftModel, on: bool) -> None:
    """Switches gradient checkpointing of all layers on or off."""
    checkpoint_activations(model.get_base_model(), on, use_reentrant=False, preserve_rng_state=False)


def set_fused(model: PeftModel, on: bool) -> None:
    """Switches fused LoRA layers on; off, PEFT's are used."""
    for module in model.modules():
        if isinstance(module, fused_lora.StackedLinear | fused_lora.StackedLinear4bit):
            module.fused = on


def _quantize(model: Any, device: str) -> None:
    linears = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:  # names, not modules: each 16-bit weight is freed before the next one is quantized
        module = model.model.get_submodule(name)
        new: torch.nn.Module
        if device == "meta":
            new = MetaNF4Linear(module.in_features, module.out_features, module.weight.dtype)
        else:
            new = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=module.weight.dtype,
                device="meta",  # the weight that it would initialize here is replaced
            )
            new.weight = Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            new = new.to(device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = device != "meta"  # PEFT checks this before it puts LoRA on a Linear4bit
