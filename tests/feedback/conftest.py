"""Servers on loopback, and a client that does not wait long between its attempts."""

import pytest

from tuna_peft.feedback.server import Server
from tuna_peft.feedback.settings import JudgeSettings, ServerSettings

KEY = "sk-secret-0123456789abcdef"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)


@pytest.fixture
def connect():
    def make(url, **settings):
        return Server(ServerSettings(base_url=url, model="some-model", **settings))

    return make


@pytest.fixture
def settings():
    """Makes settings of a judge behind a server."""

    def make(url, server=(), **fields):
        server = {"base_url": url, "model": "judge", **dict(server)}
        return JudgeSettings.model_validate({"server": server, **fields})

    return make
