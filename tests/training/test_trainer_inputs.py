"""What users of other trainers hand to `TunaTrainer`: raw rows in many containers, and models by name."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from families import make_model, make_rows
from peft import LoraConfig
from tiny_llama import write_base
from tiny_trainer import LORA, Tokens, config, trainer
from transformers import AutoTokenizer, GPTQConfig, MixtralConfig

from tuna_peft import TunaTrainer, UserError

RAW = [
    {"prompt": f"w{3 + i} w5", "completions": [f" w{6 + i}", " w8 w9", " w20"], "scores": [2.0, 1.0, float(i % 2)]}
    for i in range(6)
]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(RAW)

    def __getitem__(self, index):
        return RAW[index]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("with_tokenizer") / "base")


def make(base, folder, data, **settings):
    return TunaTrainer(base, config(folder, **settings), train_dataset=data, eval_dataset=data,
                       peft_config=LoraConfig(**LORA))  # fmt: skip


@pytest.mark.parametrize("container", [Dataset.from_list, list, lambda rows: Rows()], ids=["Dataset", "list", "torch"])
def test_containers_of_rows_train_alike(base, tmp_path, container):
    run = make(base, tmp_path, container(RAW), max_steps=2)
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    expected = make(base, tmp_path, Dataset.from_list(RAW), max_steps=2)
    expected.train()
    assert logged == [entry["loss"] for entry in expected.state.log_history if "loss" in entry]


def test_evaluate_and_predict_take_raw_rows(base, tmp_path):
    run = make(base, tmp_path, Dataset.from_list(RAW))
    expected = run.evaluate()["eval_loss"]
    assert run.evaluate(Dataset.from_list(RAW))["eval_loss"] == expected
    assert run.evaluate({"raw": RAW})["eval_raw_loss"] == expected
    output = run.predict(Dataset.from_list(RAW))
    assert output.metrics["test_loss"] == expected and output.predictions.shape == (6, 3)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(RAW)


STREAMS = [Dataset.from_list(RAW).to_iterable_dataset(), Stream()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((stream, "a streamed data set cannot be used") for stream in STREAMS),
        (Dataset.from_list([{"prompt": "w3", "completion": " w4"}]), "nothing can be ranked"),
        (Dataset.from_list([{"text": "w3 w4"}]), "the data set has the columns text"),
        (["w3 w4"], "a list cannot be read as rows"),
        (42, "a int cannot be read as rows"),
        (datasets.DatasetDict(train=Dataset.from_list(RAW)), "a DatasetDict cannot be read as rows"),
    ],
)
def test_what_cannot_be_ranked_is_refused_at_construction(base, tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        TunaTrainer(base, config(tmp_path), train_dataset=data, peft_config=LoraConfig(**LORA))


def without_weights(base, folder, **changes):
    """The base with another configuration, and no weights: what is wrong with it is said before they are loaded."""
    folder = shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stored = json.loads((Path(base) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **changes}))
    return str(folder)


def test_a_base_that_cannot_be_trained_is_refused_before_its_weights_are_loaded(base, tmp_path):
    experts = MixtralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2).to_dict()
    for changes, message in (
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
        (experts, "is a MixtralTopKRouter and not a linear layer"),
        ({"layer_types": ["linear_attention"] * 2}, "layers of type linear_attention"),
    ):
        folder = without_weights(base, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)
        with pytest.raises(UserError, match=message):
            make(folder, tmp_path / "out", Dataset.from_list(RAW))


def test_a_loaded_model_is_checked_too(tmp_path):
    model = make_model()
    model.config.quantization_config = GPTQConfig(bits=4)
    with pytest.raises(UserError, match=r"already quantized \(gptq\)"):
        trainer(model, tmp_path, make_rows())


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UserError, match="dataloader_persistent_workers needs workers"):
        trainer(make_model(), tmp_path, make_rows(), dataloader_persistent_workers=True)


def test_a_token_without_a_row_is_refused(base, tmp_path):
    rows = make_rows()
    rows[2]["completions_ids"][1][0] = 64
    with pytest.raises(UserError, match="row 2: .* has id 64, and the model has 64 rows"):
        trainer(make_model(), tmp_path, rows)
    with pytest.raises(UserError, match="row 2: .* has id 64, and the model has 64 rows"):
        TunaTrainer(make_model(), config(tmp_path), eval_dataset=Dataset.from_list(rows), processing_class=Tokens())


@pytest.mark.parametrize(
    ("row", "settings", "fix"),
    [
        ({}, {"max_length": 4}, 'overflow="cut", or skip such rows with overflow="skip"'),
        ({"prompt": "w3 " * 9}, {"max_length": 4}, 'raise max_length, or skip such rows with overflow="skip"'),
        ({"completions": [" w6", " ", " w20"]}, {}, "Correct the row, or remove it from the data set."),
        ({"prompt": [{"role": "user", "content": "w3"}], "completions": [[{"role": "assistant", "content": one}]
                                                                         for one in ("w4", "w5 w6", "w7 ")]}, {},
         'prompt=PromptConfig(rendering="verbatim")'),
    ],
)  # fmt: skip
def test_an_invalid_row_is_explained_in_arguments_not_in_keys_of_recipes(base, tmp_path, row, settings, fix):
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Generation starts after w9, which a dialogue with its answer does not have.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
    )
    data = [{**RAW[1], "completions": [" w6 w7 w8 w9", " w8", " w20"], **row}]
    with pytest.raises(UserError) as caught:
        TunaTrainer(base, config(tmp_path, **settings), train_dataset=data,
                    processing_class=tokenizer, peft_config=LoraConfig(**LORA))  # fmt: skip
    message = str(caught.value)
    assert fix in message
    assert "recipe" not in message and "on_bad_row" not in message
