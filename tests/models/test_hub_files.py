"""Files on the Hub, against a server that answers as the Hub does: what went wrong, and what to do."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

from tuna_peft.errors import UserError
from tuna_peft.models.base import load_base
from tuna_peft.models.hub_files import hub_file
from tuna_peft.planning.hub_config import read_shape

COMMIT = "a" * 40
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip
ANSWERS = {"org/gated": (401, "GatedRepo"), "org/absent": (404, "RepoNotFound"), "org/empty": (404, "EntryNotFound"),
           "org/revision": (404, "RevisionNotFound")}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """Answers requests for `org/fine/resolve/main/config.json`, and refuses as `ANSWERS` says."""

    def do_HEAD(self):
        model = "/".join(self.path.split("/")[1:3])
        body = json.dumps(CONFIG).encode()
        status, code = ANSWERS.get(model, (200, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        else:
            self.send_header("ETag", '"etag"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body) if status == 200 else 0))
        self.end_headers()
        if self.command == "GET" and status == 200:
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        """Silence."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The address of such a server; nothing cached."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    yield address
    server.shutdown()
    server.server_close()


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
def test_refusals_say_what_to_do(hub, model, what, fix):
    with pytest.raises(UserError) as error:
        hub_file(model, "config.json", "v9", endpoint=hub)
    assert what in error.value.what and fix in error.value.fix and error.value.where == model


def test_without_a_network_the_cache_is_used_and_named(hub, monkeypatch, caplog):
    assert hub_file("org/fine", "config.json", endpoint=hub)[1] == "the Hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file, source = hub_file("org/fine", "config.json")
    assert json.loads(file.read_text()) == CONFIG
    assert "no network" in source and "using the copy in the cache" in caplog.text
    assert read_shape("org/fine")[0].layers == 2


def test_without_a_network_and_a_cache_it_is_an_error_unless_the_sizes_are_known():
    with pytest.raises(UserError, match="the Hub cannot be reached, and the model is not in the cache"):
        read_shape("org/never-seen")
    shape, source = read_shape("meta-llama/Llama-3.2-1B-Instruct")
    assert shape.layers == 16 and "known to this package" in source


def test_loading_a_base_gives_the_same_errors():
    with pytest.raises(UserError, match="the Hub cannot be reached, and the model is not in the cache"):
        load_base("org/never-seen")
