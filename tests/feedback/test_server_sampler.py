"""Sampling from a server: what is sent, what is kept, and what happens when it answers badly."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from scripted_server import Answer, error, scripted_server
from tiny_llama import write_base

from tuna_peft.errors import UserError
from tuna_peft.feedback.sampling import sample_candidates
from tuna_peft.feedback.server_sampler import PLAIN, ServerSampler
from tuna_peft.feedback.settings import SampleServer, SampleSettings
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import load_base

SETTINGS = SampleSettings(n=3, temperature=0.7, top_p=0.9, max_new_tokens=4, trials=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_base(write_base(tmp_path_factory.mktemp("base") / "base"), device="cpu").tokenizer


def rows(*texts):
    return [{"id": text, "prompt": text, "reference": None, "record": {}} for text in texts]


def completion(*texts, finish="stop"):
    choices = [{"index": i, "text": text, "finish_reason": finish} for i, text in enumerate(texts)]
    return Answer(200, {"choices": choices, "usage": {"prompt_tokens": 2, "completion_tokens": 3}})


def sampler_of(server, tokenizer, **options):
    settings = SampleServer(base_url=server.url, model="m", max_retries=0, in_flight=options.pop("in_flight", 1),
                            chat=options.pop("chat", False))  # fmt: skip
    return ServerSampler(settings, tokenizer, {"adapters": {"a": 1}}, **options)


def test_each_prompt_is_sent_as_text_with_n_seed_temperature_and_top_p(tokenizer, tmp_path):
    with scripted_server(lambda asked: completion(" w3", "w4 ", "w5")) as server, Journal(tmp_path / "j") as journal:
        records, report = sample_candidates(sampler_of(server, tokenizer), rows("w3 w9", "w4"), SETTINGS, journal)
    first, second = (asked.body for asked in server.asked)
    seeds = {first.pop("seed"), second.pop("seed")}
    assert len(seeds) == 2 and all(0 <= seed < 2**31 for seed in seeds)
    assert first == {
        "model": "m",
        "prompt": "w3 w9",
        "n": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 4,
        **PLAIN,
    }
    assert server.asked[0].path.endswith("/v1/completions")
    assert [one["completions"] for one in records] == [["w3", "w4", "w5"]] * 2
    assert report.cut == 0 and report.tokens == 2 * 3 * 2  # each is a token and EOS


def test_a_cut_answer_is_told_from_one_that_ended(tokenizer, tmp_path):
    cut = completion("w3", "w4", "w5", finish="length")
    with scripted_server(lambda asked: cut) as server, Journal(tmp_path / "j") as journal:
        [record], report = sample_candidates(sampler_of(server, tokenizer), rows("w3"), SETTINGS, journal)
    assert record["sampling"]["cut"] == [True] * 3 and report.cut == 3 and report.tokens == 3


def test_a_server_that_does_not_say_how_it_ended_is_not_believed(tokenizer, tmp_path):
    with scripted_server(lambda asked: completion("w3", "w4", "w5", finish=None)) as server:
        with (
            Journal(tmp_path / "j") as journal,
            pytest.raises(UserError, match="no samples.*ended for the reason None"),
        ):
            sample_candidates(sampler_of(server, tokenizer), rows("w3"), SETTINGS, journal)
        assert len(journal) == 0


def strict(asked):
    """A server that knows neither `n` nor `top_k`, as `transformers serve`."""
    if "top_k" in asked.body:
        return error(422, "unexpected keys")
    return completion(f"w{asked.body['seed'] % 90 + 3}")


def test_a_server_without_n_is_asked_once_per_response(tokenizer, tmp_path):
    with scripted_server(strict) as server, Journal(tmp_path / "j") as journal:
        records, _ = sample_candidates(sampler_of(server, tokenizer), rows("w3", "w4"), SETTINGS, journal)
    assert [len(one["completions"]) for one in records] == [3, 3]
    later = [asked.body for asked in server.asked[-3:]]  # the second prompt begins with what worked for the first
    assert all("n" not in body and "top_k" not in body for body in later)
    assert [body["seed"] - later[0]["seed"] for body in later] == [0, 1, 2]
    assert len(server.asked) == 3 + 3 + 3  # three refusals, then three for each prompt


def test_what_is_in_the_journal_is_not_asked_again_and_gives_the_same_records(tokenizer, tmp_path):
    def once(asked):
        return error(400) if asked.body["prompt"] == "w4" and not good else completion("w3", "w4", "w5")

    good = []
    with scripted_server(once) as server, Journal(tmp_path / "j") as journal:
        with pytest.raises(UserError, match="1 of 2 prompts have no samples"):
            sample_candidates(sampler_of(server, tokenizer), rows("w3", "w4"), SETTINGS, journal)
        before = len(server.asked)
        good.append(True)
        again, _ = sample_candidates(sampler_of(server, tokenizer), rows("w3", "w4"), SETTINGS, journal)
        assert [asked.body["prompt"] for asked in server.asked[before:]] == ["w4"]
        straight, _ = sample_candidates(
            sampler_of(server, tokenizer, ready=pytest.fail), rows("w3", "w4"), SETTINGS, journal
        )
    assert straight == again


def test_another_model_server_or_stack_has_other_keys(tokenizer):
    server = SimpleNamespace(url="http://a/v1")
    one = sampler_of(server, tokenizer).identity
    assert one["server"] == "http://a/v1" and one["model"] == "m" and one["adapters"] == {"a": 1}


def test_ctrl_c_keeps_what_was_sent(tokenizer, tmp_path, monkeypatch):
    arrived, wait = threading.Event(), threading.Event.wait

    def answer(asked):
        arrived.set()
        return completion("w3", "w4", "w5")

    def interrupted(self, timeout=None):
        if threading.current_thread() is threading.main_thread() and not raised:
            wait(arrived)
            raised.append(True)
            raise KeyboardInterrupt
        return wait(self, timeout)

    raised = []
    with scripted_server(answer) as server, Journal(tmp_path / "j") as journal:
        sampler = sampler_of(server, tokenizer)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threading.Event, "wait", interrupted)
            sample_candidates(sampler, rows(*(f"w{i}" for i in range(3, 60))), SETTINGS, journal)
        assert len(journal) == len(server.asked) >= 1


def test_chat_sends_messages_and_tools(tokenizer, tmp_path):
    def answer(asked):
        assert asked.path.endswith("/v1/chat/completions")
        choices = [
            {"index": i, "message": {"content": f"w{i + 3}"}, "finish_reason": "stop"} for i in range(3)
        ]  # fmt: skip
        return Answer(200, {"choices": choices})

    with scripted_server(answer) as server, Journal(tmp_path / "j") as journal:
        sample_candidates(sampler_of(server, tokenizer, chat=True), rows("w3"), SETTINGS, journal)
    assert server.asked[0].body["messages"] == [{"role": "user", "content": "w3"}]


def test_bos_is_never_sent_twice(tokenizer):
    sampler = sampler_of(SimpleNamespace(url="http://a/v1"), tokenizer)
    ids = tokenizer("w3 w4")["input_ids"]
    assert sampler._as_sent("w3 w4", None, ids) == "w3 w4"
    bos = tokenizer.bos_token
    if ids[0] == tokenizer.bos_token_id:
        assert sampler._as_sent(f"{bos}w3 w4", None, ids) == "w3 w4"
    assert sampler._as_sent("w3 w4", None, [5, 6]) == [5, 6]  # no text gives these tokens


def test_the_cost_is_asked_about_before_anything_is_sent(tokenizer, tmp_path):
    def refuse(estimate):
        seen.append((estimate.requests, estimate.tokens_out))
        raise UserError("too much")

    seen = []
    with scripted_server(lambda asked: completion("w3", "w4", "w5")) as server, Journal(tmp_path / "j") as journal:
        with pytest.raises(UserError, match="too much"):
            sample_candidates(sampler_of(server, tokenizer, agree=refuse), rows("w3", "w4"), SETTINGS, journal)
        assert not server.asked
    assert seen == [(2, 2 * 3 * 4)]


def test_a_backend_beside_a_server_is_refused():
    with pytest.raises(ValidationError, match="no effect with `server`"):
        SampleSettings(backend="vllm", server={"base_url": "http://a/v1", "model": "m"})
