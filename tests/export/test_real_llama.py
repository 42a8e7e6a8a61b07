"""The exports on a real pre-trained LLaMA (260K parameters, rows of 172: no multiple of NF4's block size)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rounding import stack_kl_bound
from tiny_llama import load_tiny, stack_on
from transformers import AutoTokenizer

from tuna_peft.export.check import check_exports
from tuna_peft.export.combine import combine_stack
from tuna_peft.export.merge import merge_stack
from tuna_peft.models.stack.files import save_stack

DATA = Path(__file__).parents[3] / "shared" / "data"
CHECKPOINT = DATA / "checkpoints" / "stories260K"

pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"no {CHECKPOINT}: the real data is not here")


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_every_route_on_real_prompts(tmp_path: Path, method: str) -> None:
    settings = {"target_modules": "all-linear", "lora_alpha": 16}
    live = stack_on(
        load_tiny(str(CHECKPOINT), method),
        sft={"r": 8, **settings},
        probabilistic={"r": 4, **settings},
        contextual={"r": 4, "use_rslora": True, **settings},
    )
    save_stack(live, tmp_path / "stack")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    with open(DATA / "ranked" / "alpaca_eval.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["instruction"] for line, _ in zip(lines, range(4), strict=False)]
    prompts = [tokenizer(text).input_ids[:128] for text in texts]

    combine_stack(tmp_path / "stack", tmp_path / "combined")
    merge_stack(tmp_path / "stack", tmp_path / "fp32", dtype="float32")
    merge_stack(tmp_path / "stack", tmp_path / "bf16")
    exports = [tmp_path / name for name in ("combined", "fp32", "bf16")]
    found = {
        Path(path).name: kl for path, kl in check_exports(tmp_path / "stack", exports, prompts, device="cpu").items()
    }
    exact = stack_kl_bound(tmp_path / "stack")
    assert max(found["combined"].kl_max, found["fp32"].kl_max) <= exact < found["bf16"].kl_mean
    assert found["bf16"].kl_mean <= 1e-2  # the rounding of the weights, computed in fp32: the same everywhere
