"""KL and agreement against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llama_family import FAMILY, write_model
from rounding import assert_rounded, rounded, stack_kl_bound
from tiny_llama import PROMPTS, SFT, Tiny, load_tiny, stack_on
from transformers import AutoModelForCausalLM

import tuna_peft.export.check as check_module
import tuna_peft.export.divergence as divergence_module
from tuna_peft.errors import UserError
from tuna_peft.export.check import check_exports
from tuna_peft.export.compare_exports import compare_exports
from tuna_peft.export.divergence import divergence, fp32_computation, iter_logits
from tuna_peft.export.merge import merge_stack
from tuna_peft.models.stack.files import save_stack


class Bigram(torch.nn.Module):
    """A language model whose logits depend on the current token alone."""

    def __init__(self, probabilities: list[list[float]]):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_kl_and_agreement_by_hand() -> None:
    reference = Bigram([[0.5, 0.5], [0.8, 0.2]])
    other = Bigram([[0.5, 0.5], [0.4, 0.6]])
    batches = [torch.tensor([[0, 1, 1]]), torch.tensor([[0]])]
    found = divergence(iter_logits(reference, batches), other, batches)
    after_one = 0.8 * math.log(2) + 0.2 * math.log(0.2 / 0.6)
    assert found.tokens == 4
    assert found.kl_mean == rounded(2 * after_one / 4, 2, math.log(5))
    assert found.kl_max == rounded(after_one, 2, math.log(5))
    assert found.top1_agreement == 0.5
    assert found.logit_max == pytest.approx(math.log(0.6 / 0.2), rel=1e-6)


def test_a_model_does_not_diverge_from_itself_and_keeps_no_gradients() -> None:
    torch.manual_seed(0)
    model = Bigram(torch.rand(9, 9).softmax(-1).tolist())
    batches = [torch.randint(9, (3, 100))]
    found = divergence(iter_logits(model, batches), model, batches)
    assert (found.kl_mean, found.kl_max, found.top1_agreement, found.logit_max, found.tokens) == (0, 0, 1, 0, 300)
    assert model.table.grad is None


def test_exports_of_a_16_bit_stack_are_compared_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    """In bf16, an exact adapter and rounded weights would both be within the noise of bf16."""
    live = load_tiny(tiny.base)
    save_stack(stack_on(live, sft=SFT), tmp_path / "stack", {"template": "alpaca"}, load_dtype="bfloat16")
    rows = {row.name: row for row in compare_exports(tmp_path / "stack", PROMPTS, tmp_path, device="cpu")}
    kl = {name: row.divergence.kl_mean for name, row in rows.items() if row.divergence is not None}
    [noise] = [name for name, row in rows.items() if row.is_noise]
    bound = stack_kl_bound(tmp_path / "stack", dtype="float32")
    assert noise == "unmerged, bfloat16" and kl[noise] > 10 * bound
    assert kl["adapter, rank 8"] <= bound
    assert 0 < kl["adapter with its base"] < kl[noise]  # transformers rounds the adapter to bf16
    assert len({kl[f"dequantized, {dtype}"] for dtype in ("float32", "float16", "bfloat16")}) == 3
    for row in rows.values():
        if row.divergence is not None and not row.is_noise:
            assert row.divergence.is_noise == (row.divergence.kl_mean < kl[noise])
            assert ("rounding noise" in str(row.divergence)) == row.divergence.is_noise


def test_a_large_head_is_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(2, 3, 8), torch.nn.Linear(8, 10, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(hidden, head.weight.float(), head.bias.float())
    monkeypatch.setattr(divergence_module, "FP32_ROWS", 4)
    with fp32_computation(head), torch.no_grad():
        found = head(hidden)
    assert_rounded(found, expected, 9)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILY)
def test_16_bit_weights_compute_as_the_same_weights_in_fp32(tmp_path: Path, family: str) -> None:
    path = write_model(tmp_path, family)
    expected, found = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for _ in range(2))
    batches = [torch.arange(40)[None] % 29]
    with fp32_computation(found):
        result = divergence(list(iter_logits(expected.float(), batches)), found, batches)
    assert (result.kl_max, result.logit_max) == (0, 0)
    assert all(weight.dtype == torch.bfloat16 for weight in found.parameters())
    assert next(iter_logits(found, batches)).dtype == torch.bfloat16


def test_nothing_to_compare_is_an_error(tiny: Tiny) -> None:
    model = Bigram([[0.5, 0.5]])
    with pytest.raises(ValueError, match="no tokens"):
        divergence([], model, [])
    with pytest.raises(UserError, match="no prompts"):
        check_exports(tiny.stack, [], [[]])


@pytest.mark.parametrize(("kilobytes", "places"), [(20, {"disk"}), (165, {"cpu", "disk"})])
def test_a_merged_model_larger_than_memory_is_measured_from_disk(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kilobytes: int, places: set[str]
) -> None:
    """It has 172 kB."""
    merged = merge_stack(tiny.stack, tmp_path / "merged", dtype="bfloat16", device="cpu").path
    whole = check_exports(tiny.stack, [merged], PROMPTS, device="cpu")[str(merged)]
    found_at: set[str] = set()
    monkeypatch.setattr(check_module, "available_ram", lambda: kilobytes * 1000)
    monkeypatch.setattr(
        check_module, "keep_quantised_layout", lambda model: found_at.update(model.hf_device_map.values())
    )
    found = check_exports(tiny.stack, [merged], PROMPTS, device="cpu")[str(merged)]
    assert found == whole and found_at == places
    assert list(tmp_path.iterdir()) == [merged]
