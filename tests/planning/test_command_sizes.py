"""The batch sizes of an evaluation, from the loaded model and the lengths of a task."""

from __future__ import annotations

import pytest

from tuna_peft.limits import GIB, UNPLANNED_BATCH
from tuna_peft.models.base.load import load_base
from tuna_peft.planning import command_sizes
from tuna_peft.planning.command_sizes import batch_size
from tuna_peft.planning.spec import Device

ROWS = [(20, (5, 7)), (30, (6, 6))]


@pytest.fixture
def pico():
    return load_base("builtin:pico-llama", device="cpu").model


@pytest.fixture
def on_cpu(monkeypatch):
    def free(memory):
        monkeypatch.setattr(command_sizes, "this_device", lambda device: Device("CPU", memory, cuda=False, bf16=False))

    return free


def test_it_follows_memory_and_lengths(pico, on_cpu):
    size = batch_size("auto", pico)
    on_cpu(64 * GIB)
    assert size(ROWS, 8) == size(ROWS, None) == 32
    on_cpu(1.2 * GIB)
    assert size([(2000, (0,))], 2000) < size([(20, (0,))], 20)
    assert size([(2000, (50,))], None) < size([(20, (5,))], None)


def test_a_number_stays_and_an_unknown_model_gets_the_usual_one(pico, on_cpu, monkeypatch):
    on_cpu(64 * GIB)
    assert batch_size(7, pico) == 7
    monkeypatch.setattr(pico.config, "model_type", "unheard_of")
    assert batch_size("auto", pico)(ROWS, 8) == UNPLANNED_BATCH
