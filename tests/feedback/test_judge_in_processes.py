"""A judge on this machine answers in two processes as in one."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
from tiny_llama import write_base

from tuna_peft.feedback.judge import Judging
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.journal import Journal
from tuna_peft.models.generation import generate
from tuna_peft.models.workers import Workers

ROWS = [{"id": str(i), "prompt": f"w{i + 3} w4", "completions": [f"w{i}", "w7 w8"]} for i in range(20)]


def judge(folder, name):
    settings = JudgeSettings(model=str(folder / "base"), batch_size=2, max_tokens=8, attempts=2, temperature=0.5)
    with Journal(folder / name) as journal:
        judging = Judging(ROWS, settings, journal, device="cpu")
        judging.judge.answer(journal, judging.questions, "judging")


def process(rank, folder):
    torch.set_num_threads(1)
    blocks, run = [], generate._Decoder.run
    generate._Decoder.run = lambda self, block, *rest: blocks.append(len(block)) or run(self, block, *rest)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    workers, model = Workers(dist.group.WORLD), torch.nn.Linear(1, 1)
    if rank:
        workers.follow(model)
    else:
        with workers.lead(model):
            judge(folder, "two.jsonl")
    (folder / f"blocks{rank}").write_text(" ".join(map(str, blocks)))
    os._exit(0)


@pytest.mark.parametrize("begun", [False, True])
def test_two_processes_judge_to_the_bytes_of_one(tmp_path, begun):
    write_base(tmp_path / "base")
    config = tmp_path / "base" / "config.json"  # the questions are long
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2048}))
    judge(tmp_path, "one.jsonl")
    if begun:  # by one process, which was killed in the first block
        lines = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "two.jsonl").write_bytes(b"".join(lines[:3]))
    torch.multiprocessing.spawn(process, args=(tmp_path,), nprocs=2)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    # Two attempts at 20 questions, in blocks of 8.
    assert [(tmp_path / f"blocks{rank}").read_text() for rank in range(2)] == ["8 4 8 4", "8 8"]
