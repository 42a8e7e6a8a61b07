"""The option `compile`."""

from functools import partial

import pytest
from families import make_rows
from tiny_trainer import config, stacked, trainer
from torch._dynamo.utils import counters
from transformers import HfArgumentParser

from tuna_peft import TunaConfig, UserError
from tuna_peft.models.forward.compiled import compile_layers, decoder_layers
from tuna_peft.recipe.train_fields import check_train
from tuna_peft.training import compiled_layers


def test_training_with_compiled_layers_gives_the_same_losses(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_layers, "compile_layers", partial(compile_layers, backend="eager"))
    counters.clear()
    losses = []
    for on in (False, True):
        run = trainer(stacked(base_folder), tmp_path, make_rows(6), max_steps=2, compile=on)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert ["forward" in vars(layer) for layer in decoder_layers(run.model)] == [False, False]
    assert losses[0] == losses[1] and counters["stats"]["unique_graphs"]


def test_a_base_that_processes_share_is_refused(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_layers, "is_sharded", lambda model: True)
    run = trainer(stacked(base_folder), tmp_path, make_rows(2), compile=True)
    with pytest.raises(UserError, match="`compile: true` is not supported where processes share a base"):
        run.train()


@pytest.mark.parametrize(
    ("value", "on"), [("auto", False), (True, True), (False, False), ("true", True), ("False", False)]
)
def test_values(tmp_path, value, on):
    assert config(tmp_path, compile=value).compile is on
    [parsed] = HfArgumentParser(TunaConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--compile", str(value)]
    )
    assert parsed.compile is on


def test_other_values_are_errors(tmp_path):
    with pytest.raises(ValueError, match="compile='all': use true, false or auto"):
        config(tmp_path, compile="all")
    assert [len(check_train("ranking", {"compile": value})) for value in ("all", "auto", True)] == [1, 0, 0]
