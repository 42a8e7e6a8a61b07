"""A server that answers requests for a model's files as the Hub does, and refuses some models as it refuses them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

COMMIT = "a" * 40
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip
ANSWERS = {
    "org/gated": (401, "GatedRepo"),
    "meta-llama/Llama-2-7b-hf": (401, "GatedRepo"),
    "org/absent": (404, "RepoNotFound"),
    "org/empty": (404, "EntryNotFound"),
    "org/revision": (404, "RevisionNotFound"),
}


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
    # Both, as they are once HF_ENDPOINT is read.
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = template.replace(huggingface_hub.constants.ENDPOINT, address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    yield address
    server.shutdown()
    server.server_close()
