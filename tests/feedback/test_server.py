"""The client against a server that misbehaves in every way that servers do."""

from __future__ import annotations

import gzip
import logging
import traceback

import pytest
from pydantic import ValidationError
from scripted_server import Answer, Drip, Drop, Hang, chat, error, scripted_server
from spies import spy

from tuna_peft.errors import UserError
from tuna_peft.feedback import server as module
from tuna_peft.feedback.server import BadAnswer, NoAnswer, Refused, choices, message_text
from tuna_peft.feedback.settings import ServerSettings
from tuna_peft.feedback.spending import CostLimitReached, Usage

HELLO = [{"role": "user", "content": "hello"}]


def scripted(*answers):
    """One answer after the other, the last one for ever."""
    return lambda asked: answers[min(asked.number, len(answers) - 1)]


def test_a_good_answer(connect, key):
    with scripted_server(scripted(chat("hi ünd 🐟"))) as http:
        server = connect(http.url)
        reply = server.chat(HELLO, max_tokens=5, temperature=0.0)
    assert message_text(reply) == ("hi ünd 🐟", False)
    assert reply.usage == server.spending.usage == Usage(1, 100, 20)
    assert http.asked[0].path == "/v1/chat/completions"
    assert http.asked[0].body == {"model": "some-model", "messages": HELLO, "max_tokens": 5, "temperature": 0.0}
    assert http.asked[0].headers["authorization"] == f"Bearer {key}"


@pytest.mark.parametrize(
    "fault",
    [
        error(500),
        error(503),
        error(429, headers={"Retry-After": "0.01"}),
        error(408),
        Drop(200, {"choices": []}),
        Hang(600),
    ],
    ids=["500", "503", "429", "408", "dropped in mid-answer", "hang"],
)
def test_passing_faults_are_asked_again(connect, fault):
    with scripted_server(scripted(fault, fault, chat("hi"))) as http:
        hangs = isinstance(fault, Hang)
        # A busy machine may be late with the good answer as well, and is asked once more.
        reply = connect(http.url, **({"timeout": 1.0, "max_retries": 20} if hangs else {})).chat(HELLO)
    assert message_text(reply)[0] == "hi"
    assert len(http.asked) >= 3 if hangs else len(http.asked) == 3


def test_retry_after_is_waited_for(connect):
    with scripted_server(scripted(error(429, headers={"Retry-After": "0.5"}), chat("hi"))) as http:
        connect(http.url).chat(HELLO)
    assert http.asked[1].when - http.asked[0].when >= 0.5


def test_a_drip_is_a_time_out(connect):
    drip = Drip({"choices": ["x" * 500]}, pause=0.05)
    with (
        scripted_server(scripted(drip)) as http,
        pytest.raises(NoAnswer, match="no answer within 0.2 s in up to 2 attempts"),
    ):
        connect(http.url, timeout=0.2, max_retries=1).chat(HELLO)


def test_lasting_faults_end(connect):
    overloaded = pytest.raises(NoAnswer, match="503 after up to 3 attempts: overloaded")
    with scripted_server(scripted(error(503, "overloaded"))) as http, overloaded:
        connect(http.url, max_retries=2).chat(HELLO)
    assert len(http.asked) == 3
    with pytest.raises(NoAnswer, match="no connection in 2 attempts"):  # it is gone now
        connect(http.url, max_retries=1).chat(HELLO)


STATUSES = {
    **dict.fromkeys([400, 406, 413, 415, 422, 451], Refused),  # of this request: others may succeed
    **dict.fromkeys([401, 402, 403, 404, 405], UserError),  # of every request
    **dict.fromkeys([408, 409, 429, 500, 502, 503, 504, 529], NoAnswer),  # after repetitions
}


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_the_class_of_every_status(connect, status, kind):
    with scripted_server(scripted(error(status, "words"))) as http, pytest.raises(UserError, match="words") as caught:
        connect(http.url, max_retries=1).chat(HELLO)
    assert type(caught.value) is kind
    assert len(http.asked) == (2 if kind is NoAnswer else 1)


def test_the_client_gets_every_setting(monkeypatch):
    import openai

    settings = ServerSettings(
        base_url="http://host/v1", model="m", api_key_env="OTHER_API_KEY", timeout=7.5, max_retries=3, in_flight=5
    )
    monkeypatch.setenv("OTHER_API_KEY", "sk-other-key")
    clients, limits = spy(monkeypatch, openai, "OpenAI", None), spy(monkeypatch, module, "_limited_client", "limited")
    module.Server(settings)
    assert clients == [((), {"base_url": "http://host/v1", "api_key": "sk-other-key", "max_retries": 3,
                             "timeout": 7.5, "http_client": "limited"})]  # fmt: skip
    assert limits == [((settings,), {})]


def test_no_more_connections_and_seconds_than_allowed():
    settings = ServerSettings(base_url="http://host/v1", model="m", timeout=7.5, in_flight=5)
    with module._limited_client(settings) as client:
        assert (client.timeout.read, client.timeout.connect) == (7.5, 7.5)
        pool = client._transport._pool
        assert (pool._max_connections, pool._max_keepalive_connections) == (5, 5)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refusals_are_not_repeated(connect, status):
    refused = pytest.raises(Refused, match=f"{status}: context too long")
    with scripted_server(scripted(error(status, "context too long"))) as http, refused:
        connect(http.url).chat(HELLO)
    assert len(http.asked) == 1


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "key in OPENAI_API_KEY"), (403, "key in"), (402, "no credit"), (404, "Check the base URL and the model")],
)
def test_what_no_request_survives(connect, status, says):
    with scripted_server(scripted(error(status))) as http, pytest.raises(UserError, match=says) as caught:
        connect(http.url).chat(HELLO)
    assert not isinstance(caught.value, module.RequestFailed)
    assert len(http.asked) == 1


@pytest.mark.parametrize(
    "body", [b"", b"not json", b'{"choices": [', b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'"text"']
)
def test_what_is_no_json_object(connect, body):
    with scripted_server(scripted(Answer(200, body))) as http, pytest.raises(BadAnswer):
        connect(http.url).chat(HELLO)


@pytest.mark.parametrize(
    "body",
    [{}, {"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": [{}]}, {"choices": [{"message": "x"}]},
     {"choices": [{"message": {"content": None}}]}, {"choices": [{"message": {"content": ["x"]}}]},
     {"choices": [{"index": 1, "message": {"content": "x"}}]}, {"choices": [{}, {}]}],
)  # fmt: skip
def test_what_has_no_text(connect, body):
    with scripted_server(scripted(Answer(200, body))) as http, pytest.raises(BadAnswer):
        message_text(connect(http.url).chat(HELLO))


def test_choices_stand_in_order(connect):
    body = {"choices": [{"index": 2}, {"index": 0}, {"index": 1}]}
    with scripted_server(scripted(Answer(200, body))) as http:
        reply = connect(http.url).complete("x", n=3)
    assert [choice["index"] for choice in choices(reply, 3)] == [0, 1, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_huge_answers_are_given_up(connect, monkeypatch, packed):
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 1 << 20)
    huge = chat("x" * (3 << 20)).body
    answer = Answer(200, gzip.compress(huge) if packed else huge, {"Content-Encoding": "gzip"} if packed else {})
    with scripted_server(scripted(answer)) as http, pytest.raises(BadAnswer, match="longer than 1 MiB"):
        connect(http.url).chat(HELLO)
    assert len(http.asked) == 1


def test_compressed_answers_are_read(connect):
    answer = Answer(200, gzip.compress(chat("hi").body), {"Content-Encoding": "gzip"})
    with scripted_server(scripted(answer)) as http:
        assert message_text(connect(http.url).chat(HELLO))[0] == "hi"


def test_half_characters_in_an_answer(connect):
    with scripted_server(scripted(chat("a \ud83d b \ude00\ud83d\ude00"))) as http:
        text, _ = message_text(connect(http.url).chat(HELLO))
    assert text == "a \ufffd b \ufffd😀"


def test_half_characters_in_a_question(connect):
    with scripted_server(scripted(chat("hi"))) as http, pytest.raises(Refused, match="surrogate"):
        connect(http.url).chat([{"role": "user", "content": "a \ud83d b"}])


# The key


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_a_server_that_repeats_the_key(connect, key, status, caplog):
    caplog.set_level(logging.DEBUG)
    repeats = scripted(error(status, f"bad \x1b[31m key {key}, {key}!"))
    with scripted_server(repeats) as http, pytest.raises(UserError) as caught:
        connect(http.url, max_retries=1).chat(HELLO)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text
    assert key not in shown and "\x1b" not in str(caught.value)
    assert "[key]" in str(caught.value)


def test_a_server_that_sends_the_key_as_garbage(connect, key):
    with scripted_server(scripted(Answer(200, key.encode()))) as http, pytest.raises(BadAnswer) as caught:
        connect(http.url).chat(HELLO)
    assert key not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", ["sk-one\nsk-two", "sk- ä", "sk-\x00"])
def test_a_key_that_no_header_can_hold(connect, monkeypatch, value):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": value})
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        connect("http://127.0.0.1:9/v1")
    assert "sk-" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "wrong",
    [{"api_key": "sk-oops"}, {"api_key_env": "sk-oops"}, {"base_url": "http://sk-oops@host/v1"},
     {"base_url": "http://host/v1?key=sk-oops"}, {"base_url": "ftp://sk-oops"}, {"base_url": "sk-oops"}],
)  # fmt: skip
def test_a_key_in_the_wrong_place_is_not_repeated(wrong):
    with pytest.raises(ValidationError) as caught:
        ServerSettings.model_validate({"base_url": "http://host/v1", "model": "m", **wrong})
    assert "sk-oops" not in str(caught.value)


def test_without_a_key(connect, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with scripted_server(scripted(error(401), chat("hi"))) as http:
        with pytest.raises(UserError, match="requires an API key, and OPENAI_API_KEY is not set"):
            connect(http.url).chat(HELLO)
        assert message_text(connect(http.url).chat(HELLO))[0] == "hi"


# Cost

PRICES = {"price_in": 10.0, "price_out": 100.0}


def test_spending_is_what_the_server_counts(connect):
    with scripted_server(scripted(chat("hi", usage=(1000, 50)))) as http:
        server = connect(http.url, **PRICES)
        server.chat(HELLO)
        server.chat(HELLO)
    assert server.spending.cost == pytest.approx(2 * (1000 * 10 + 50 * 100) / 1e6)


@pytest.mark.parametrize("usage", [None, (-1, 5), (True, 5), ("5", 5), (1.5, 5), (1 << 50, 5)])
def test_usage_that_cannot_be_true_is_estimated(connect, usage):
    answer = chat("hi")
    body = {"choices": [{"message": {"content": "hi"}}]}
    if usage is not None:
        body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    answer = Answer(200, body)
    with scripted_server(scripted(answer)) as http:
        assert connect(http.url).chat(HELLO, max_tokens=7).usage == Usage(1, 6, 7)


def test_nothing_is_asked_above_the_limit(connect):
    # The most that a request can cost: 6 tokens in, 100 out.
    worst = (6 * 10 + 100 * 100) / 1e6
    with scripted_server(scripted(chat("hi", usage=(6, 50)))) as http:
        server = connect(http.url, max_cost=2.2 * worst, **PRICES)
        with pytest.raises(CostLimitReached, match="is spent"):
            for _ in range(9):
                server.chat(HELLO, max_tokens=100)
    assert len(http.asked) == 3  # 0.5 each, and the next one could take 1.0
    assert server.spending.cost <= 2.2 * worst


def test_what_cannot_be_read_is_paid_for(connect):
    with scripted_server(scripted(Answer(200, b"garbage"))) as http, pytest.raises(BadAnswer):
        server = connect(http.url, **PRICES)
        server.chat(HELLO, max_tokens=100)
    assert server.spending.usage == Usage(1, 6, 100)


def test_a_limit_needs_prices():
    with pytest.raises(ValidationError, match="`max_cost` needs"):
        ServerSettings(base_url="http://host/v1", model="m", max_cost=1)
