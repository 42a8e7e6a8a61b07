"""Compiled decoder layers: one graph for any number of tokens, and the results of layers that are not compiled."""

import pytest
import torch
from families import make_model, make_rows
from peft import LoraConfig
from rounding import assert_rounded, gradient_operations
from test_segments import simulated_kernel
from tiny_llama import RANKING, SFT, load_tiny, stack_on
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward import compiled, prefix, segments
from tuna_peft.models.forward.checkpointing import checkpoint_activations
from tuna_peft.models.forward.compiled import compile_layers, decoder_layers
from tuna_peft.models.forward.scoring import response_logps
from tuna_peft.models.stack.adapters import push_adapter, train_top_adapter
from tuna_peft.training.activation_memory import ActivationMemory

SEEDS = 1, 2, 3, 4


@torch.library.custom_op("tests::varlen", mutates_args=())
def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offsets: torch.Tensor, k_offsets: torch.Tensor,
    longest: int, scale: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """The variable-length kernel as an operator that a compiler does not look into, as on a GPU."""
    return simulated_kernel(q, k, v, q_offsets, k_offsets, longest, longest, scale, (window, 0))


def _backward(ctx, grad):
    with torch.enable_grad():
        states = [state.detach().requires_grad_() for state in ctx.inputs[:3]]
        q_offsets, k_offsets, longest, scale, window = ctx.inputs[3:]
        output = simulated_kernel(*states, q_offsets, k_offsets, longest, longest, scale, (window, 0))
    return *torch.autograd.grad(output, states, grad), *(None,) * 5


kernel.register_fake(lambda q, *others: torch.empty_like(q))
kernel.register_autograd(_backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "inputs", inputs))


@pytest.fixture
def one_kernel(monkeypatch):
    """All sequences are long, and the variable-length kernel is there."""

    def call(q, k, v, q_offsets, k_offsets, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
        return kernel(q, k, v, q_offsets, k_offsets, longest_k, scale, window_size[0])

    monkeypatch.setattr(prefix, "LONG_ROW", 1)
    monkeypatch.setattr(varlen, "varlen_attn", call)
    monkeypatch.setattr(segments, "_supports_varlen", lambda query, dropout: True)
    monkeypatch.setattr(compiled, "has_varlen_attention", lambda device: True)


@pytest.fixture(autouse=True)
def compiler_as_before():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def nf4_stack(base_path):
    model = stack_on(load_tiny(base_path, "nf4"), sft=SFT, top=RANKING)
    return prepared(model)


def prepared(model):
    train_top_adapter(model)
    model.enable_input_require_grads()
    checkpoint_activations(model, False)
    return model.train()


def results(model, seed):
    """Log-probabilities and gradients of a batch; its number of rows, lengths and segments depend on `seed`."""
    model.zero_grad()
    batch = RankedCollator(pad_token_id=0)(make_rows(2 + seed % 3, seed=seed))
    assert len(batch.tokens_U) != 64, "a graph made for as many tokens as the hidden size serves no other number"
    sums = response_logps(model, batch).sums_BN
    sums.sum().backward()
    return [sums.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def same(tensors, expected):
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


def graphs():
    return counters["stats"]["unique_graphs"]


def test_a_quantized_layer_is_one_graph_for_any_number_of_tokens(base_path, one_kernel):
    model = nf4_stack(base_path)
    eager = [results(model, seed) for seed in SEEDS]
    restore = compile_layers(model, "eager")
    for seed, expected in zip(SEEDS, eager, strict=False):
        same(results(model, seed), expected)
        assert graphs() == 1 and not counters["graph_break"]
    restore()
    results(model, 9)
    assert graphs() == 1 and "forward" not in vars(decoder_layers(model)[0])


def test_layers_with_and_without_a_window_are_two_graphs(one_kernel):
    model = make_model("qwen3-window", num_hidden_layers=4, max_window_layers=2)
    model = prepared(push_adapter(model, "top", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)))
    eager = [results(model, seed) for seed in SEEDS[:2]]
    compile_layers(model, "eager")
    for seed, expected in zip(SEEDS, eager, strict=False):
        same(results(model, seed), expected)
    assert graphs() == 2 and not counters["graph_break"]


def test_checkpointed_and_kept_layers_share_the_graph(base_path, one_kernel):
    model = nf4_stack(base_path)
    eager = results(model, SEEDS[0])
    compile_layers(model, "eager")
    checkpoint_activations(model, True, use_reentrant=False)
    policy = ActivationMemory(1e-9)  # measures a layer, then recomputes all
    policy.attach(model)
    same(results(model, SEEDS[0]), eager)
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True] * len(decoder_layers(model))
    decoder_layers(model)[1].gradient_checkpointing = False
    policy.detach()
    same(results(model, SEEDS[0]), eager)
    assert graphs() == 1


def test_what_is_not_compiled(base_path, monkeypatch):
    """Passes without gradients, and those with one call of the kernel per segment."""
    model = nf4_stack(base_path)
    compile_layers(model, "eager")
    with torch.no_grad():
        response_logps(model.eval(), RankedCollator(pad_token_id=0)(make_rows(2)))
    monkeypatch.setattr(prefix, "LONG_ROW", 1)
    results(model.train(), SEEDS[0])
    assert not graphs()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_traced_layers_give_the_results_of_eager_ones(base_path, backend):
    """With a dense mask, as short sequences have."""
    model = nf4_stack(base_path)
    eager = [results(model, seed) for seed in SEEDS[:2]]
    compile_layers(model, backend)
    for seed, expected in zip(SEEDS, eager, strict=False):
        for value, right in zip(results(model, seed), expected, strict=True):
            assert_rounded(value, right, gradient_operations(model))
    assert graphs()


def test_what_a_gpu_supports_is_a_constant_of_the_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    device = torch.device("cuda")

    def doubled(x):
        return 2 * x if segments.has_flash(device) and segments.has_varlen_attention(device) else x

    x = torch.ones(3)
    assert torch.equal(torch.compile(doubled, backend="eager", fullgraph=True)(x), doubled(x))
