"""As many layers as the budget allows keep their activations; results do not change."""

import logging
from types import SimpleNamespace

import pytest
import torch
from families import make_model, make_rows
from peft import LoraConfig
from transformers import HfArgumentParser

from tuna_peft import limits
from tuna_peft.data.collate import RankedCollator
from tuna_peft.limits import ACTIVATIONS_ON_GPU, ACTIVATIONS_ON_GPUS, GIB
from tuna_peft.models.forward.checkpointing import checkpoint_activations
from tuna_peft.models.forward.scoring import response_logps
from tuna_peft.models.stack.adapters import push_adapter
from tuna_peft.recipe.train_fields import check_train
from tuna_peft.training import activation_memory
from tuna_peft.training.activation_memory import ActivationMemory, saved_bytes
from tuna_peft.training.config import TunaConfig

LAYERS = 4


@pytest.fixture
def model():
    base = make_model(num_hidden_layers=LAYERS)
    model = push_adapter(base, "top", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.enable_input_require_grads()
    checkpoint_activations(base, True, use_reentrant=False)
    return model.train()


@pytest.fixture
def batch():
    return RankedCollator(pad_token_id=0)(make_rows(3))


def kept(model):
    return [not layer.gradient_checkpointing for layer in model.get_base_model().model.layers]


def gradients(model, batch):
    model.zero_grad()
    response_logps(model, batch).sums_BN.sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def layer_gib(model, batch):
    """GiB of one layer's activations for this batch, measured with an unlimited budget."""
    policy = ActivationMemory(1e6)
    policy.attach(model)
    gradients(model, batch)
    policy.detach()
    return policy._bytes_per_token * batch.input_ids_BT.numel() / GIB


@pytest.mark.parametrize("layers", [0, 1, 3, LAYERS, 10])
def test_as_many_layers_as_fit_and_the_last_ones(model, batch, layers):
    size = layer_gib(model, batch)
    policy = ActivationMemory((layers + 0.5) * size)
    policy.attach(model)
    gradients(model, batch)
    expected = min(layers, LAYERS)
    assert kept(model) == [False] * (LAYERS - expected) + [True] * expected


@pytest.mark.parametrize(("setting", "expected"), [("full", True), ("none", False), ("auto", True), (0, False)])
def test_settings(model, batch, setting, expected):
    policy = ActivationMemory(setting)
    policy.attach(model)
    gradients(model, batch)
    assert kept(model) == [expected] * LAYERS


def test_results_do_not_depend_on_it(model, batch):
    size, found = layer_gib(model, batch), []
    for setting in ("none", 1.5 * size, 3.5 * size, "full"):
        policy = ActivationMemory(setting)
        policy.attach(model)
        found.append(gradients(model, batch))
        policy.detach()
    for other in found[1:]:
        assert {torch.equal(a, b) for a, b in zip(found[0], other, strict=True)} == {True}


def test_saved_bytes_are_those_that_a_backward_pass_holds(model):
    """Against the definition: the tensors that autograd saves in a forward pass, without weights and inputs."""
    layer = model.get_base_model().model.layers[0]
    hidden = torch.randn(2, 24, 64, requires_grad=True)
    tables = model.get_base_model().model.rotary_emb(hidden, torch.arange(24)[None])
    inputs = (hidden,), {"position_embeddings": tables, "attention_mask": None}
    once = saved_bytes(layer, *inputs)
    doubled = (torch.cat([hidden.detach(), hidden.detach()]).requires_grad_(),), inputs[1]
    assert 48 * 64 * 4 * 6 < once < 48 * 64 * 4 * 60
    assert saved_bytes(layer, *doubled) == pytest.approx(2 * once, rel=0.15)  # the adapters' factors do not grow


def test_measuring_draws_no_random_numbers(model, batch):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    layer_gib(model, batch)
    assert torch.equal(torch.rand(1), expected)


def test_auto_uses_the_free_memory_of_a_gpu_after_the_first_step(model, batch, monkeypatch, caplog):
    """Simulated GPU: 10 units in use, 4 more at the peak of the first step, 6.5 units free afterwards."""
    size = layer_gib(model, batch) * GIB
    monkeypatch.setattr(activation_memory, "_start_watching", lambda device: 10 * size)
    monkeypatch.setattr(activation_memory, "_peak", lambda device: 14 * size)
    monkeypatch.setattr(activation_memory, "free_bytes", lambda device: 6.5 / ACTIVATIONS_ON_GPU * size)
    policy = ActivationMemory("auto")
    policy.attach(model)
    budget, gpu = policy._budget, torch.device("cuda")
    monkeypatch.setattr(policy, "_budget", lambda device, tokens: budget(gpu, tokens))
    gradients(model, batch)
    assert kept(model) == [False] * LAYERS
    policy.on_step_end(SimpleNamespace(device=gpu), None, None, optimizer=SimpleNamespace(state={}))  # skipped
    gradients(model, batch)
    assert kept(model) == [False] * LAYERS
    with caplog.at_level(logging.INFO, logger="tuna_peft"):
        policy.on_step_end(SimpleNamespace(device=gpu), None, None, optimizer=SimpleNamespace(state={0: {}}))
        gradients(model, batch)
    assert kept(model) == [False, False, True, True]  # 6.5 are free, the pass itself takes 4
    assert "2 of 4 layers keep their activations" in caplog.text


def test_a_cpu_budget_knows_the_limit_of_the_container(tmp_path, monkeypatch):
    files = {
        "proc/meminfo": "MemTotal: 999 kB\nMemAvailable: 64000000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "8000\n",
        "sys/fs/cgroup/memory.current": "5000\n",
        "sys/fs/cgroup/memory.stat": "anon 4000\nfile 1000\nactive_file 600\ninactive_file 400\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    assert ActivationMemory("auto")._budget(torch.device("cpu"), tokens=1) == 0.5 * (8000 - 5000 + 1000)


def test_out_of_memory_halves_the_layers_that_keep_their_activations(model, batch):
    policy = ActivationMemory(1e6)
    policy.attach(model)
    gradients(model, batch)
    counts = [sum(kept(model))]
    while policy.release():
        gradients(model, batch)
        counts.append(sum(kept(model)))
    assert counts == [4, 2, 1, 0]


def test_out_of_memory_with_all_kept_makes_all_recompute(model, batch):
    policy = ActivationMemory("full")
    policy.attach(model)
    assert policy.release() and not policy.release()
    assert kept(model) == [False] * LAYERS


def test_several_processes_take_the_least_memory_of_all_and_a_margin(model, batch, monkeypatch):
    size = layer_gib(model, batch) * GIB
    monkeypatch.setattr(activation_memory, "_start_watching", lambda device: 0)
    monkeypatch.setattr(activation_memory, "_peak", lambda device: 100)
    monkeypatch.setattr(activation_memory, "free_bytes", lambda device: 9 * size)
    seen = []

    def gather(own):
        seen.extend(own)
        return [*own, (2.0, 3 * size), (7.0, 5 * size)]  # of two other processes

    monkeypatch.setattr(activation_memory, "gather_object", gather)
    policy = ActivationMemory("auto", processes=3)
    policy.attach(model)
    gpu = torch.device("cuda")
    assert policy._budget(gpu, tokens=50) == 0
    policy.on_step_end(SimpleNamespace(device=gpu), None, None, optimizer=SimpleNamespace(state={0: {}}))
    assert seen == [(2.0, ACTIVATIONS_ON_GPUS * 9 * size)]
    assert policy._budget(gpu, tokens=50) == pytest.approx(3 * size - 7.0 * 50)


def test_processes_that_share_a_base_recompute_all_layers():
    assert ActivationMemory("auto", processes=2, sharded=True).setting == "none"


@pytest.mark.parametrize("value", ["lots", -1, "nan"])
def test_a_wrong_setting_is_an_error(tmp_path, value):
    with pytest.raises(ValueError, match="use GiB, or one of auto, full, none|out of range: use 0 or more"):
        TunaConfig(str(tmp_path), activation_memory=value, use_cpu=True)


@pytest.mark.parametrize(("given", "parsed"), [([], "auto"), (["--activation_memory", "2.5"], 2.5)])
def test_scripts_parse_it_from_the_command_line(tmp_path, given, parsed):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "True", *given]
    [config] = HfArgumentParser(TunaConfig).parse_args_into_dataclasses(arguments)
    assert config.activation_memory == parsed


@pytest.mark.parametrize(("value", "problems"), [("auto", 0), (4, 0), (2.5, 0), (True, 1), ([1], 1)])
def test_recipes_take_words_and_numbers(value, problems):
    assert len(check_train("ranking", {"activation_memory": value})) == problems


def test_checkpointing_off_keeps_all(tmp_path):
    assert TunaConfig(str(tmp_path), gradient_checkpointing=False, use_cpu=True).activation_memory == "full"
    assert TunaConfig(str(tmp_path), activation_memory="2.5", use_cpu=True).activation_memory == 2.5
    with pytest.raises(ValueError, match="needs gradient_checkpointing"):
        TunaConfig(str(tmp_path), gradient_checkpointing=False, activation_memory=2, use_cpu=True)
