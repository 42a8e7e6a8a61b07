"""TRL's SFTTrainer takes the encoded rows as they are."""

import datasets

from tuna_peft.data.tokenize import encode_dataset


def test_sft_trainer_trains_on_our_tokens(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "xa", "completion": "b"}, {"prompt": "x", "completion": "ccd"}]
    encoded, _ = encode_dataset(datasets.Dataset.from_list(rows), tokenizer, max_length=16)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    args = SFTConfig(tmp_path, max_length=None, bf16=False, use_cpu=True, report_to="none", max_steps=1)
    trainer = SFTTrainer(model, args, train_dataset=encoded, processing_class=tokenizer)
    assert trainer.train_dataset["input_ids"][:] == [[0, 7, 10, 1], [0, 7, 5, 11, 1]]
    assert trainer.train_dataset["labels"][:] == [[-100, -100, 10, 1], [-100, -100, 5, 11, 1]]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    # pad is EOS here: the padding carries no loss, the EOS of the response does.
    assert batch["labels"].tolist() == [[-100, -100, 10, 1, -100], [-100, -100, 5, 11, 1]]
