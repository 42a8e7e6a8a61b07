"""What `TunaTrainer` saves: plain PEFT loads it, the stack stays verified, and its card is ours."""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from rounding import operations_of, rounding
from safetensors.torch import load_file
from tiny_llama import load_tiny, write_base
from tiny_trainer import config

from tuna_peft import AdapterStack, TunaTrainer
from tuna_peft.models.stack.adapters import push_adapter

RAW = [{"prompt": "w3 w5", "completions": [" w6", " w8 w9"], "scores": [1.0, 0.0]}] * 4
# Ranks, scalings and targets that differ: an adapter per line, from the bottom.
STACK = {
    "sft": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "first": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "second": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "rank_pattern": {"o_proj": 5}},
}


@pytest.fixture(scope="module", params=[1, 3])
def saved(request, tmp_path_factory):
    """A trainer after `save_model` in the middle of its second epoch, with one adapter and with three."""
    folder = tmp_path_factory.mktemp("saved")
    base = load_tiny(write_base(folder / "base"), "none")
    model = base.model
    for name, settings in list(STACK.items())[-request.param :]:
        model = push_adapter(model, name, LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter.data, std=0.05)
    run = TunaTrainer(model, config(folder / "out", max_steps=3, save_strategy="steps", save_steps=1),
                      train_dataset=Dataset.from_list(RAW), processing_class=base.tokenizer)  # fmt: skip
    run.train()
    run.save_model()
    return run, folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 5, 9, 12]])).logits.float()


@pytest.mark.parametrize("where", ["out", "out/checkpoint-3"])
def test_plain_peft_loads_it(saved, where):
    run, folder = saved
    expected, base = logits(run.model), load_tiny(str(folder / "base"), "none")
    bound = rounding(operations_of(run.model), expected)
    assert (logits(base.model) - expected).abs().max() > 100 * bound  # the adapters matter
    for model in (
        PeftModel.from_pretrained(base.model, folder / where),
        AutoPeftModelForCausalLM.from_pretrained(folder / where, dtype=torch.float32),
        AdapterStack.from_pretrained(folder / where, device="cpu").model,
    ):
        torch.testing.assert_close(logits(model), expected, atol=bound, rtol=0)


def test_saving_twice_replaces_the_sum(saved):
    run, folder = saved
    file = folder / "out" / "adapter_model.safetensors"
    parameter = next(parameter for parameter in run.model.parameters() if parameter.requires_grad)
    before, old = load_file(file), parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
        run.save_model()
        changed = [key for key, value in load_file(file).items() if not torch.equal(value, before[key])]
        parameter.copy_(old)
    run.save_model()
    assert len(changed) == 1


def test_its_card_is_ours(saved):
    run, folder = saved
    run.create_model_card(model_name="mine", dataset_name="owner/rankings", tags="more")
    text = (folder / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.datasets == ["owner/rankings"] and card.data.library_name == "peft"
    assert {"tuna", "more"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local path: the Hub would reject the card
    assert "arxiv.org/abs/2310.13385" in text and "`second`" in text and "# mine" in text


def test_push_to_hub_takes_the_arguments_of_trl(saved, monkeypatch):
    run, folder = saved
    uploads = []

    class Api:
        def upload_folder(self, **arguments):
            uploads.append(arguments)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: Api())
    monkeypatch.setattr(run, "init_hf_repo", lambda **_: setattr(run, "hub_model_id", "owner/mine"))
    run.push_to_hub(dataset_name="owner/rankings", model_name="mine")
    assert uploads[0]["folder_path"] == str(folder / "out")
    assert "owner/rankings" in (folder / "out" / "README.md").read_text()


def test_resuming_at_the_last_step_trains_nothing_more(saved):
    run, folder = saved
    again = TunaTrainer(
        run.model, config(folder / "out", max_steps=3), train_dataset=Dataset.from_list(RAW),
        processing_class=run.processing_class,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-3"))
    assert again.state.global_step == 3
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())
