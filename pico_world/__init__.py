"""The small world of pico-LLaMA: tasks that a program can grade, written by a generator.

The way the data flows: `lexicon` (the words) -> `families` (task records) -> `styles` (responses of different
quality) -> `mixtures` (which style is written where) -> `documents` (pre-training text) and `datafiles` (the files
that the recipes read). `grader` scores any response. `tokenizer`, `pretrain` and `build` make the model.
Only `pretrain`, `probe` and `build` import torch.
"""
