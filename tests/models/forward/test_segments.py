"""Attention by segment: the arguments of the kernels, and models that do not support it."""

import sys

import pytest
import torch
from families import make_model, make_rows
from rounding import logps_bound
from torch.nn.attention import varlen

from tuna_peft import UserError
from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward import prefix, segments
from tuna_peft.models.forward.scoring import response_logps


@pytest.fixture(autouse=True)
def all_sequences_are_long(monkeypatch):
    monkeypatch.setattr(prefix, "LONG_ROW", 1)


def test_keys_of_a_sequence_that_branches_twice():
    row = {
        "prompt_ids": [5, 6],
        "completions_ids": [[7, 8, 9], [7, 8, 4], [3]],
        "completion_skips": [0, 0, 0],
        "ranks": [0, 1, 2],
    }
    batch = RankedCollator(pad_token_id=0, pad_to_multiple_of=9)([row])
    # tokens: 5 6 | 7 8 9 | 4 | 3 | two of padding. 7 and 8 are shared by two responses.
    assert batch.segment_ids_BT.tolist() == [[0, 0, 1, 1, 1, 2, 3, 4, 4]]
    assert batch.q_offsets.tolist() == [0, 2, 5, 6, 7]
    keys = batch.keys_K.split(batch.k_offsets.diff().tolist())
    assert [part.tolist() for part in keys] == [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 6]]


def test_keys_agree_with_the_dense_mask():
    batch = RankedCollator(pad_token_id=0)(make_rows(3) + make_rows(3, vocabulary=3, seed=1))
    tokens, width = batch.tokens_U, batch.input_ids_BT.shape[1]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    starts = batch.q_offsets.tolist()
    parts = batch.keys_K.split(batch.k_offsets.diff().tolist())
    for start, end, keys in zip(starts, starts[1:], parts, strict=False):
        for back, query in enumerate(reversed(range(start, end))):
            seen[query, keys[: len(keys) - back]] = True
    dense = prefix.shared_prefix_mask(batch.segment_ids_BT, batch.position_ids_BT, batch.limits_BSS)[:, 0]
    assert torch.equal(seen, torch.block_diag(*dense)[tokens][:, tokens].bool()) and width * len(dense) > len(tokens)


def test_padding_is_not_computed():
    model, computed = make_model(), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: computed.append(output.shape))
    rows = make_rows(2, response=(1, 3)) + make_rows(2, response=(20, 30))
    batch = RankedCollator(pad_token_id=0)(rows)
    together = response_logps(model, batch)
    assert computed == [(1, len(batch.tokens_U), 64)] and batch.input_ids_BT.numel() > 1.3 * len(batch.tokens_U)
    for row, sums, lengths in zip(rows, together.sums_BN, together.lengths_BN, strict=True):
        alone = response_logps(model, RankedCollator(pad_token_id=0)([row]))
        n = len(row["ranks"])
        torch.testing.assert_close(sums[:n], alone.sums_BN[0], atol=logps_bound(model, 31), rtol=0)
        assert torch.equal(lengths[:n], alone.lengths_BN[0])


def simulated_kernel(q, k, v, q_offsets, k_offsets, max_q, max_k, scale, window_size):
    """The definition of the CUDA kernel: causal attention, aligned at the end, within the window."""
    assert q_offsets.dtype == k_offsets.dtype == torch.int32 and q_offsets[-1] == len(q)
    assert q_offsets.diff().max() <= max_q and k_offsets.diff().max() <= max_k
    outputs = []
    for queries, keys, values in zip(
        q.split(q_offsets.diff().tolist()),
        k.split(k_offsets.diff().tolist()),
        v.split(k_offsets.diff().tolist()),
        strict=True,
    ):
        shift = len(keys) - len(queries)
        away = torch.arange(len(queries))[:, None] + shift - torch.arange(len(keys))
        mask = (away >= 0) & ((away <= window_size[0]) | (window_size[0] == -1))
        states = (part.transpose(0, 1) for part in (queries, keys, values))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                *states, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


def kernel_of_2_10(q, k, v, q_offsets, k_offsets, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("called without a scale and a window")


def kernel_of_2_11(q, k, v, q_offsets, k_offsets, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Takes grouped heads without being told."""
    return simulated_kernel(q, k, v, q_offsets, k_offsets, max_q, max_k, scale, window_size)


def kernel_of_2_12(q, k, v, q_offsets, k_offsets, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa or q.shape[1] == k.shape[1]
    return simulated_kernel(q, k, v, q_offsets, k_offsets, max_q, max_k, scale, window_size)


@pytest.fixture
def install_kernel(monkeypatch):
    """Installs the `varlen_attn` of another PyTorch version, and simulates a GPU with FlashAttention."""

    def install(kernel):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        segments.varlen_options.cache_clear()

    yield install
    segments.varlen_options.cache_clear()


@pytest.mark.parametrize("kernel", [kernel_of_2_11, kernel_of_2_12])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_the_variable_length_kernel_gets_the_same_attention(family, kernel, monkeypatch, install_kernel):
    model, batch = make_model(family), RankedCollator(pad_token_id=0)(make_rows(3) + make_rows(2, vocabulary=3))
    by_calls = response_logps(model, batch).sums_BN
    install_kernel(kernel)
    monkeypatch.setattr(segments, "_supports_varlen", lambda query, dropout: True)
    torch.testing.assert_close(response_logps(model, batch).sums_BN, by_calls, atol=logps_bound(model, 9), rtol=0)


@pytest.mark.parametrize(("kernel", "there"), [(kernel_of_2_10, False), (kernel_of_2_11, True), (None, False)])
def test_a_kernel_without_scale_and_window_is_not_used(kernel, there, monkeypatch, install_kernel):
    install_kernel(kernel)
    if kernel is None:  # before PyTorch 2.10
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert segments.has_varlen_attention(torch.device("cuda")) == there


@pytest.mark.parametrize(
    ("capability", "built", "there"),
    [((7, 5), True, False), ((8, 0), True, True), ((8, 9), True, True), ((12, 0), True, True), ((8, 9), False, False)],
    ids=["T4", "A100", "RTX 4090", "RTX 5090", "RTX 4090 on Windows"],
)
def test_which_gpus_have_flash(capability, built, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert segments.has_flash(torch.device("cuda")) == there
    assert not segments.has_flash(torch.device("cpu"))


def test_heads_that_the_variable_length_kernel_does_not_support(monkeypatch):
    monkeypatch.setattr(segments, "has_flash", lambda device: True)
    states = torch.zeros(1, 2, 4, 80, dtype=torch.float16)
    assert segments._supports_varlen(states, 0.0) and not segments._supports_varlen(states[..., :36], 0.0)
    assert not segments._supports_varlen(states, 0.1) and not segments._supports_varlen(states.float(), 0.0)


def test_flash_needs_16_bits_and_a_gpu():
    states = torch.zeros(1, 2, 4, 8)
    assert not segments._supports_varlen(states, 0.0) and not segments._supports_varlen(states.half(), 0.0)


def test_calls_without_segments_are_plain_sdpa():
    model, ids = make_model(), torch.tensor([[1, 5, 9, 4, 7]])
    before = model(input_ids=ids).logits
    response_logps(model, RankedCollator(pad_token_id=0)(make_rows(1)))
    assert model.config._attn_implementation == segments.NAME
    assert torch.equal(model(input_ids=ids).logits, before)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, make_model().generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert segments.NAME not in model.config.to_json_string()


def test_a_model_that_drops_keyword_arguments_is_refused():
    model = make_model()
    forward = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *args, segments=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="llama does not pass keyword arguments"):
        response_logps(model, RankedCollator(pad_token_id=0)(make_rows(1)))
