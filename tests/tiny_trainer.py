"""`TunaTrainer` on tiny random models and rows that are tokenized already."""

import torch
from datasets import Dataset
from peft import LoraConfig

from tuna_peft import TunaConfig, TunaTrainer
from tuna_peft.models.base.load import make_quantization_config
from tuna_peft.models.stack.adapters import push_adapter

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Tokens:
    """The attributes of a tokenizer that the trainer uses when rows are encoded already."""

    pad_token_id, eos_token_id = 0, 2
    model_input_names = ["input_ids"]

    def convert_ids_to_tokens(self, token):
        return f"w{token}"

    def save_pretrained(self, folder):
        """A checkpoint holds the tokenizer too; there is none here."""


def quantised(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=make_quantization_config("nf4"),
                                                 device_map={"": "cpu"}, dtype=dtype)  # fmt: skip
    return model.requires_grad_(False)


def config(folder, **settings):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "report_to": "none",
                "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "use_cpu": True,
                "disable_tqdm": True, "dataloader_pin_memory": False}  # fmt: skip
    return TunaConfig(str(folder), **{**defaults, **settings})


def trainer(model, folder, rows, callbacks=None, **settings):
    data = Dataset.from_list(rows)
    return TunaTrainer(
        model,
        config(folder, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=Tokens(),
        callbacks=callbacks,
    )


def stacked(base_folder, names=("one",), dtype=torch.float32):
    model = quantised(base_folder, dtype)
    for name in names:
        torch.manual_seed(len(name))
        model = push_adapter(model, name, LoraConfig(**LORA))
        for (
            key,
            parameter,
        ) in model.named_parameters():  # PEFT starts B at zero: a stack that does nothing tests nothing
            if f"lora_B.{name}" in key:
                torch.nn.init.normal_(parameter, std=0.05)
    return model
