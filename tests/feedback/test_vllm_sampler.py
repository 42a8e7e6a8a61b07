"""The vLLM backend against a module of that name that records what it is asked."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_llama import write_base, write_stack

from tuna_peft.errors import UserError
from tuna_peft.feedback.sampling import sample_candidates
from tuna_peft.feedback.settings import SampleSettings
from tuna_peft.feedback.vllm_sampler import VllmSampler, lora_rank, require_known
from tuna_peft.journal import Journal
from tuna_peft.run.samplers import open_sampler


@pytest.fixture
def vllm(monkeypatch):
    """Each sample is the token 3 + its number, then EOS, but for the last one, which is cut."""
    calls = SimpleNamespace(engine=None, batches=[])

    class LLM:
        def __init__(self, **options):
            calls.engine = options

        def generate(self, prompts, params, lora_request=None, *, use_tqdm):
            calls.batches.append((prompts, params, lora_request))
            return [SimpleNamespace(outputs=[self.sample(k, p.n) for k in range(p.n)]) for p in params]

        def sample(self, number, n):
            cut = number == n - 1
            tokens = [3 + number, 4] if cut else [3 + number, 2]
            return SimpleNamespace(token_ids=tuple(tokens), finish_reason="length" if cut else "stop")

    module = ModuleType("vllm")
    module.__version__ = "0.32.1"
    module.LLM, module.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, path=path)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return calls


def test_a_stack_goes_to_the_engine_as_one_adapter_on_an_nf4_base(vllm, tmp_path):
    base = write_base(tmp_path / "base")
    write_stack(tmp_path / "stack", base)
    prompts = [{"id": i, "prompt": f"w{i} w9", "reference": None, "record": {}} for i in (3, 4)]
    settings = SampleSettings(n=3, temperature=0.7, top_p=0.9, max_new_tokens=2, trials=1)
    with open_sampler(str(tmp_path / "stack"), "vllm") as (sampler, prompt), Journal(tmp_path / "j.jsonl") as journal:
        records, report = sample_candidates(sampler, prompts, settings, journal)
    assert vllm.engine["model"] == base and vllm.engine["quantization"] == "bitsandbytes"
    assert vllm.engine["max_lora_rank"] == 16  # 8 + 4 in the widest module
    assert vllm.engine["max_model_len"] == 2 + 2  # the longest prompt and its response, not the model's context
    assert "gpu_memory_utilization" not in vllm.engine  # its own default, where nothing else is on the GPU
    assert prompt.template == "alpaca"
    [(asked, params, adapter)] = vllm.batches
    assert [len(one["prompt_token_ids"]) for one in asked] == [2, 2]
    assert adapter.path.endswith("adapter")
    assert (params[0].n, params[0].temperature, params[0].top_p, params[0].max_tokens) == (3, 0.7, 0.9, 2)
    assert params[0].seed != params[1].seed
    assert records[0]["completions"] == ["w3", "w4", "w5 w4"]
    assert records[0]["sampling"]["cut"] == [False, False, True] and report.cut == 2


@pytest.mark.parametrize(
    ("free", "share"),
    [(12, 0.688), (15.5, 0.9), (0.5, 0.0)],
    ids=["beside a model in training", "nearly empty", "full"],
)
def test_it_takes_what_this_process_leaves_of_the_gpu_and_gives_it_back(vllm, free, share, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 16 * 2**30))
    with open_sampler(write_base(tmp_path / "base"), "vllm") as (sampler, _):
        list(sampler.sample([[3]], SampleSettings(max_new_tokens=2), temperature=1.0, seed="0", done=set()))
        assert vllm.engine["gpu_memory_utilization"] == pytest.approx(share, abs=1e-3)
        engine = weakref.ref(sampler._engine)
    assert engine() is None


def test_what_it_cannot_do_is_said(vllm, tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    with pytest.raises(UserError, match="not support int8"), open_sampler(base, "vllm", quantization="int8"):
        pass
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 513}))
    with pytest.raises(UserError, match="rank 513, vLLM serves up to 512"):
        lora_rank(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="needs the package vllm"), open_sampler(base, "vllm"):
        pass


def test_versions_that_are_known_not_to_work_are_refused():
    require_known("0.10.0")
    require_known("0.32.9rc1")
    for version in ("0.33.0", "0.33", "1.0"):
        with pytest.raises(UserError, match=f"vLLM {version} does not work(.|\\n)*Sample from a server"):
            require_known(version)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm, which needs a GPU")
def test_the_installed_engine_knows_every_option_that_it_is_given(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    adapter = write_stack(tmp_path / "stack", write_base(tmp_path / "base")) / "sft"
    sampler = VllmSampler(str(tmp_path / "base"), None, adapter=adapter, quantized=True)
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {*sampler._options, "max_model_len", "gpu_memory_utilization"} <= known
