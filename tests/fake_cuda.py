"""A simulated GPU for machines without one: shapes, dtypes and devices are those of CUDA; no values are computed.

PyTorch's fake tensors check what CUDA checks before it computes: that all tensors of an operation are on one device
and in compatible dtypes, with autocast's casts. They also raise an error where the CPU would wait for the GPU
(`item`, boolean indices, `nonzero`), except where this file supplies a result. A PyTorch built for CPUs lacks the part
of CUDA that knows the current device. `install` replaces it by one that does nothing, for the whole process, so
`test_fake_cuda.py` runs this file as a process of its own:

    python fake_cuda.py    # prints {case: traceback, or "" if it passed} as JSON
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from families import make_model, make_rows
from launches import Launches
from peft import LoraConfig
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tuna_peft import TunaConfig, TunaTrainer
from tuna_peft.data.batch import PackedBatch
from tuna_peft.data.collate import RankedCollator
from tuna_peft.evaluation.ranking import _scored
from tuna_peft.models.forward import prefix, segments
from tuna_peft.models.forward import verify as verify_module
from tuna_peft.models.forward.checkpointing import checkpoint_activations
from tuna_peft.models.forward.verify import verify_packing
from tuna_peft.models.generation.generate import stream_responses
from tuna_peft.models.stack.adapters import push_adapter

GPU, STAND_IN = "cuda:0", "standin:0"
GPUS = {"T4": ((7, 5), torch.float16), "A100": ((8, 0), torch.bfloat16)}


class Fake(FakeTensorMode):
    """Fake tensors that never initialize the real device."""

    avoid_device_init = True


class Tokens:
    """The attributes of a tokenizer that the trainer and generation use."""

    pad_token_id, eos_token_id = 0, 2
    model_input_names = ["input_ids"]

    def decode(self, ids, skip_special_tokens):
        return ""


class _StandIn(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


def install() -> None:
    """Registers a device called CUDA in this process."""
    _setup_privateuseone_for_python_backend("standin", backend_module=_StandIn())
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, private_use_one = 1, 20  # c10::DeviceType
    guards[cuda] = guards[private_use_one]


@contextmanager
def simulated_gpu(name: str) -> Iterator[torch.dtype]:
    """Within this context the GPU exists and new tensors are fake; yields the dtype that a run computes in."""
    capability, dtype = GPUS[name]
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.get_device_capability", lambda device=None: capability),
        patch("torch.cuda.is_bf16_supported", lambda *_: dtype is torch.bfloat16),
        patch("torch.backends.cuda.is_flash_attention_available", lambda: True),
        patch.object(FakeTensor, "tolist", lambda tensor: numpy.full(tensor.shape, 5).tolist()),
        Fake(),
    ):
        yield dtype


def like(tensor: torch.Tensor, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
    """An uninitialized tensor of the same shape."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)


on_gpu = partial(like, device=GPU)


def stack(family: str = "llama", **sizes: int) -> torch.nn.Module:
    """Two adapters on a tiny NF4 model with grouped-query attention; on the CPU, in fp32."""
    model = make_model(family, **sizes)
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                bias = child.bias is not None
                layer = Linear4bit(child.in_features, child.out_features, bias=bias, quant_type="nf4")
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer.to("cpu"))
    model.requires_grad_(False)
    for name in ("one", "two"):
        model = push_adapter(model, name, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def moved(model: torch.nn.Module, dtype: torch.dtype, device: str = GPU) -> torch.nn.Module:
    """The model on the simulated GPU: the base in `dtype`, the adapters in fp32."""
    on_gpu = partial(like, device=device)
    adapters = {id(parameter) for name, parameter in model.named_parameters() if "lora" in name}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = on_gpu(buffer)
        for name, own in module._parameters.items():
            if own is None:
                continue
            state = getattr(own, "quant_state", None)
            kept = state is not None or id(own) in adapters
            weight = torch.nn.Parameter(on_gpu(own, None if kept else dtype), requires_grad=own.requires_grad)
            if state is not None:
                for part in (state, state.state2):
                    part.absmax, part.code = on_gpu(part.absmax), on_gpu(part.code)
                state.offset, state.dtype, module.compute_dtype = on_gpu(state.offset), dtype, dtype
                weight.quant_state = state
            module._parameters[name] = weight
    return model


@contextmanager
def collated(rows: list[dict[str, Any]], by_segment: bool) -> Iterator[PackedBatch]:
    """Yields the batch of these rows. Within this context every collator returns an uninitialized batch of its shapes,
    and attention is computed by segment, or never, whatever the length."""
    batch = RankedCollator(0)(rows)
    lengths = batch.q_offsets.diff().tolist(), batch.k_offsets.diff().tolist()
    with (
        patch.object(RankedCollator, "__call__", lambda *_: batch.map(like)),
        patch.object(prefix, "LONG_ROW", 1 if by_segment else 10**6),
        patch.object(segments.Segments, "lengths", lengths),  # otherwise read from the GPU
    ):
        yield batch


def train(
    name: str, by_segment: bool, family: str = "llama", mistake: Callable[[], Any] = contextlib.nullcontext
) -> None:
    """The forward pass of `TunaTrainer`: autocast, checkpointing, the loss and its metrics."""
    with step(name, by_segment, family) as (trainer, model, batch, counts, dtype), mistake():
        inputs = batch.map(on_gpu)
        model.forward = torch.autocast("cuda", dtype)(model.forward)  # as accelerate does it
        loss = trainer.compute_loss(moved(model, dtype).train(), inputs, num_items_in_batch=counts)
    require(loss.dtype == torch.float32, f"the loss is in {loss.dtype}")


def train_back(name: str, by_segment: bool) -> None:
    """The backward pass. Autograd needs more of CUDA than is simulated, so this runs on a device of another name.
    Autocast does not know that device: the base is in 16 bits, and nothing is cast."""
    supports_varlen = patch.object(segments, "_supports_varlen", lambda *_: name == "A100")
    with step(name, by_segment) as (trainer, model, batch, counts, dtype), supports_varlen:
        inputs = batch.map(partial(like, device=STAND_IN))
        loss = trainer.compute_loss(moved(model, dtype, STAND_IN).train(), inputs, num_items_in_batch=counts)
        loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    require(len(trained) == 28, f"{len(trained)} tensors train")
    for parameter in trained:
        require(
            parameter.grad is not None and parameter.grad.dtype == torch.float32, "GradScaler needs fp32 gradients"
        )
        require(str(parameter.grad.device) == STAND_IN, f"a gradient is on {parameter.grad.device}")


# Operations of an NF4 layer with a frozen and a trained adapter on each of its seven linear layers, forward and
# backward, in the second pass of a step: the first one concatenates the factors. A real GPU has 14 fewer backward,
# whose products of adapter gradients come out in fp32.
LAYER_LAUNCHES = 54, 163


def launches() -> None:
    """What one more layer adds to a step, with the variable-length kernel and without gradient checkpointing."""
    two, three = (_launches(layers) for layers in (2, 3))
    found = three[0] - two[0], three[1] - two[1]
    require(found == LAYER_LAUNCHES, f"a layer starts {found} kernels, not {LAYER_LAUNCHES}")


def _launches(layers: int) -> tuple[int, int]:
    supports_varlen = patch.object(segments, "_supports_varlen", lambda *_: True)
    with step("A100", True, num_hidden_layers=layers) as (trainer, model, batch, counts, dtype), supports_varlen:
        checkpoint_activations(model, False)
        inputs = batch.map(partial(like, device=STAND_IN))
        moved(model, dtype, STAND_IN).train()
        for _ in range(2):
            with Launches() as forward:
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=counts)
            with Launches() as backward:
                loss.backward()
    return forward.count, backward.count


@contextmanager
def step(name: str, by_segment: bool, family: str = "llama", **sizes: int) -> Iterator[Any]:
    """Yields a trainer, its model, a batch, the counts of its loss and the dtype; within it the GPU is simulated."""
    model, rows = stack(family, **sizes), make_rows(3)
    with tempfile.TemporaryDirectory() as folder:
        data, args = Dataset.from_list(rows), TunaConfig(folder, use_cpu=True, report_to="none")
        trainer = TunaTrainer(model, args, train_dataset=data, processing_class=Tokens())
    checkpoint_activations(model, True, use_reentrant=False, preserve_rng_state=False)
    with collated(rows, by_segment) as batch:
        counts = trainer._count([batch])
        with simulated_gpu(name) as dtype:
            yield trainer, model, batch, counts, dtype


def evaluate(name: str, by_segment: bool) -> None:
    """The evaluation task `ranking`: no autocast, no gradients."""
    model, rows = stack().eval(), make_rows(3)
    with collated(rows, by_segment), simulated_gpu(name) as dtype:
        moved(model, dtype)
        scored = _scored(model, Tokens(), Dataset.from_list(rows), 3, 1.0, "")
    require(len(scored) == 3, "rows are missing")


def verify(name: str, by_segment: bool) -> None:
    """The check before training, under its autocast."""
    model, [row] = stack(), make_rows(1)
    with collated([row], by_segment), simulated_gpu(name) as dtype:
        moved(model, dtype)
        # Values mean nothing on this device, so any difference must do.
        anything = patch.dict(verify_module._TOLERANCE, {dtype: (math.inf, math.inf)})
        with anything, torch.autocast("cuda", dtype):
            verify_packing(model, row, torch.device(GPU))


def generate(name: str) -> None:
    """Two prompts of equal length, two samples of each, without and with a dense copy of the weights."""
    model = stack().eval()
    with simulated_gpu(name) as dtype:
        moved(model, dtype)
        prompts, options = [[1, 4, 5], [1, 6, 7]], {"temperature": 0.7, "top_p": 0.9}
        for dense in (False, True):
            options["dense"] = dense
            generated = list(stream_responses(model, Tokens(), prompts, n=2, max_new_tokens=3, **options))
            require(len(generated) == 2, "prompts are missing")


def grouped_query_attention(name: str) -> None:
    """SDPA gets `enable_gqa` where FlashAttention can be used, and a mask everywhere else."""
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*states, attn_mask=None, enable_gqa=False, **kwargs):
        asked.append((enable_gqa, attn_mask is not None))
        return attend(*states, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    with simulated_gpu(name) as dtype, patch("torch.nn.functional.scaled_dot_product_attention", noted):
        for queries, made in ((9, dtype), (1, dtype), (9, torch.float32)):
            query = torch.empty(2, 4, queries, 16, dtype=made, device=GPU)
            key = torch.empty(2, 2, 9, 16, dtype=made, device=GPU)
            output, _ = segments.segment_attention(layer, query, key, key, None)
            require(output.shape == (2, queries, 4, 16), f"attention gives {output.shape}")
    flash = (name == "A100", name != "A100")
    require(asked == [flash, flash, (False, True)], f"(enable_gqa, masked) on a {name}: {asked}")


@contextmanager
def mask_on_cpu() -> Iterator[None]:
    """A deliberate mistake: the attention mask stays on the CPU."""
    make = prefix.shared_prefix_mask
    with patch.object(prefix, "shared_prefix_mask", lambda *layout: make(*layout).cpu()):
        yield


@contextmanager
def reads_from_gpu() -> Iterator[None]:
    """A deliberate mistake: the step reads a number from the GPU."""
    make = prefix.shared_prefix_mask
    with patch.object(prefix, "shared_prefix_mask", lambda *layout: make(*layout)[..., : int(layout[0].max())]):
        yield


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


CASES = {
    f"{case.__name__} on {name}{' by segment' if by_segment else ''}": partial(case, name, by_segment)
    for case in (train, train_back, evaluate, verify)
    for name in GPUS
    for by_segment in (False, True)
}
CASES |= {
    f"{case.__name__} on {name}": partial(case, name) for case in (generate, grouped_query_attention) for name in GPUS
}
CASES |= {
    f"train {family} on {name}": partial(train, name, True, family) for family in ("qwen2", "gemma3") for name in GPUS
}
CASES["launches"] = launches
MISTAKES = {
    "FakeTensorDeviceMismatchError": partial(train, "T4", False, mistake=mask_on_cpu),
    "DataDependentOutputException": partial(train, "T4", False, mistake=reads_from_gpu),
}


def main() -> None:
    install()
    results = {}
    for name, case in {**CASES, **MISTAKES}.items():
        try:
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
