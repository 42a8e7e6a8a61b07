"""Errors of downloads from the Hub, against a local server that answers like the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from refusing_hub import CONFIG, hub  # noqa: F401 - hub is a fixture
from spies import spy

from tuna_peft.errors import UserError
from tuna_peft.models.base import hub_files
from tuna_peft.models.base.hub_files import hub_file
from tuna_peft.models.base.load import load_base
from tuna_peft.planning.hub_config import read_shape


@pytest.mark.parametrize(
    ("model", "what", "fix"),
    [
        ("org/gated", "the model is gated", "run `hf auth login`"),
        ("org/absent", "there is no such model on the Hub", "run `hf auth login`"),
        ("org/empty", "the model has no config.json", "transformers' format"),
        ("org/revision", "the model has no revision 'v9'", "base.revision"),
        ("not a model", "neither a folder here nor a Hub id", "Check the name"),
    ],
)
def test_refusals_say_what_to_do(hub, model, what, fix):  # noqa: F811
    with pytest.raises(UserError) as error:
        hub_file(model, "config.json", "v9")
    assert what in error.value.what and fix in error.value.fix and error.value.where == model


def test_without_a_network_the_cache_is_used_and_named(hub, monkeypatch, caplog):  # noqa: F811
    assert hub_file("org/fine", "config.json")[1] == "the Hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file, source = hub_file("org/fine", "config.json")
    assert json.loads(file.read_text()) == CONFIG
    assert "no network" in source and "using the copy in the cache" in caplog.text
    assert read_shape("org/fine")[0].layers == 2


def test_revision_and_address_arrive_at_the_hub_and_at_its_cache(monkeypatch):
    options = {"revision": "v9", "endpoint": "https://mirror"}
    asked, loaded = (spy(monkeypatch, hub_files, name, "x") for name in ("get_hf_file_metadata", "hf_hub_download"))
    addresses = spy(monkeypatch, hub_files, "hf_hub_url", "an address")
    assert hub_file("org/x", "config.json", "v9", endpoint="https://mirror") == (Path("x"), "the Hub")
    assert addresses == loaded == [(("org/x", "config.json"), options)] and asked[0][0] == ("an address",)
    spy(monkeypatch, hub_files, "get_hf_file_metadata")
    cached = spy(monkeypatch, hub_files, "try_to_load_from_cache", "there")
    assert hub_file("org/x", "config.json", "v9") == (Path("there"), hub_files.CACHE)
    assert cached == [(("org/x", "config.json"), {"revision": "v9"})]


def test_without_a_network_and_a_cache_it_is_an_error_unless_the_sizes_are_known():
    with pytest.raises(UserError, match="the Hub cannot be reached, and the model is not in the cache"):
        read_shape("org/never-seen")
    shape, source = read_shape("meta-llama/Llama-3.2-1B-Instruct")
    assert shape.layers == 16 and "table of known models" in source


def test_loading_a_base_gives_the_same_errors():
    with pytest.raises(UserError, match="the Hub cannot be reached, and the model is not in the cache"):
        load_base("org/never-seen")
