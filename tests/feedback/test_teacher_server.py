"""Teachers behind servers: pico-LLaMA on loopback must give the scores of pico-LLaMA in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from rounding import logps_bound
from scripted_server import Answer, error, scripted_server

from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import ScoreSettings
from tuna_peft.feedback.teacher import score_rows
from tuna_peft.feedback.teacher_server import score_with_server
from tuna_peft.journal import Journal
from tuna_peft.models.base.load import load_base, resolve_model_path

PROMPT = "### Instruction:\nHow many of these are fruits?\n\n### Input:\n{}\n\n### Response:\n"
ROWS = [
    {"id": str(i), "prompt": PROMPT.format(words), "completions": ["There are 2 fruits.", "2", "Two, I think!"]}
    for i, words in enumerate(("apple, dog, pear", "fig, wolf", "melon, plum, cat"))
]


@pytest.fixture(scope="module")
def pico():
    return load_base("builtin:pico-llama", device="cpu")


def logps(pico, ids):
    with torch.no_grad():
        values = pico.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [None, *values[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1).tolist()]


def completions(pico):
    """A completions server: `echo` as OpenAI had it, `prompt_logprobs` as vLLM has it, `n` samples."""

    def answer(asked):
        body, tokenizer = asked.body, pico.tokenizer
        if body.get("echo"):
            ids = tokenizer(body["prompt"]).input_ids
            generated = [*ids, 40]  # one token more than was asked about
            tokens = [tokenizer.decode([token]) for token in generated]
            logprobs = {"tokens": tokens, "token_logprobs": logps(pico, generated), "text_offset": []}
            return choices([{"text": tokenizer.decode(generated), "logprobs": logprobs}])
        if "prompt_logprobs" in body:
            ids = body["prompt"]
            values = [
                None if v is None else {str(t): {"logprob": v}} for t, v in zip(ids, logps(pico, ids), strict=True)
            ]
            return choices([{"text": "x", "prompt_logprobs": values}])
        texts = [f" sample {k} " for k in range(body["n"] - 1)] + [""]
        if "messages" in body:
            content = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
            return choices([{"message": {"content": text}, "logprobs": {"content": content}} for text in texts])
        return choices(
            [{"text": text, "logprobs": {"token_logprobs": [-0.25 * (k + 1)] * 2}} for k, text in enumerate(texts)]
        )

    return answer


def choices(given, finish="stop"):
    found = [{"index": k, "finish_reason": finish, **choice} for k, choice in enumerate(given)]
    return Answer(200, {"choices": found, "usage": {"prompt_tokens": 10, "completion_tokens": 1}})


def settings(url, *, server=(), **options):
    return ScoreSettings.model_validate({"server": {"base_url": url, "model": "pico", **dict(server)}, **options})


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "scores.journal.jsonl") as opened:
        yield opened


def local(pico, tmp_path):
    with Journal(tmp_path / "local.jsonl") as journal:
        return score_rows(pico.model, pico.tokenizer, ROWS, ScoreSettings(model="pico"), journal)[0]


def test_token_ids_give_the_scores_of_the_model_in_memory(pico, journal, tmp_path):
    with scripted_server(completions(pico)) as http:
        tokenizer = resolve_model_path("builtin:pico-llama")
        records, report = score_with_server(ROWS, settings(http.url, tokenizer=tokenizer), journal)
        assert len(http.asked) == report.asked == 9
        for record, expected in zip(records, local(pico, tmp_path), strict=True):
            assert record["completions"] == expected["completions"]
            assert record["scores"] == pytest.approx(expected["scores"], rel=0, abs=logps_bound(pico.model))
            assert record["lengths"] == expected["lengths"]  # EOS among them
        again, report = score_with_server(ROWS, settings(http.url, tokenizer=tokenizer, length_penalty=0.5), journal)
        assert len(http.asked) == 9 and report.found == 9 and again[0]["length_penalty"] == 0.5
    assert records[0]["teacher"] == {"model": "pico", "revision": None, "server": http.url}


def test_echo_gives_the_response_without_eos_and_without_the_generated_token(pico, journal):
    with scripted_server(completions(pico)) as http:
        records, _ = score_with_server(ROWS, settings(http.url), journal)
    for record, row in zip(records, ROWS, strict=True):
        start = len(pico.tokenizer(row["prompt"]).input_ids)
        for text, total, length in zip(record["completions"], record["logprobs"], record["lengths"], strict=True):
            ids = pico.tokenizer(row["prompt"] + text).input_ids
            assert length == len(ids) - start
            assert total == pytest.approx(sum(logps(pico, ids)[start:]), rel=0, abs=logps_bound(pico.model, length))


def test_tokens_that_do_not_join_go_by_their_offsets_and_straddling_ones_count(journal):
    def answer(asked):
        logprobs = {
            "tokens": ["bytes:\\xe4", "b c", " d", "x"],
            "token_logprobs": [None, -1.0, -2.0, -9.0],
            "text_offset": [0, 1, 4, 6],
        }
        return choices([{"text": "?", "logprobs": logprobs}])

    rows = [{"id": "0", "prompt": "äb", "completions": [" c d", " c e"]}]
    with scripted_server(answer) as http, pytest.raises(UserError, match="all tied"):
        score_with_server(rows, settings(http.url), journal)
    assert [(journal[key]["logprob"], journal[key]["length"]) for key in journal] == [(-3.0, 2)] * 2


@pytest.mark.parametrize("prompt", ["p", [{"role": "user", "content": "p"}]], ids=["text", "messages"])
def test_a_server_that_generates_and_scores_in_one_request(pico, journal, prompt):
    rows = [{"id": "0", "prompt": prompt, "reference": "r", "record": {}}]
    generate = {"n": 4, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    with scripted_server(completions(pico)) as http:
        if isinstance(prompt, str):
            [record], _ = score_with_server(rows, settings(http.url, generate=generate), journal)
            assert record["completions"] == ["sample 0", "sample 1", "sample 2"]
            assert record["scores"] == [-0.25, -0.5, -0.75] and record["reference"] == "r"
            assert http.asked[0].body["logprobs"] == 1
        else:  # every sample has the same score here
            with pytest.raises(UserError, match="all tied: 1"):
                score_with_server(rows, settings(http.url, generate=generate), journal)
            assert http.asked[0].path == "/v1/chat/completions" and http.asked[0].body["logprobs"] is True
    assert len(http.asked) == 1
    assert {key: http.asked[0].body[key] for key in generate} == generate


def broken(choice):
    return lambda asked: choices([choice])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": "p a"}, "does the server support `echo`"),
        ({"logprobs": {"tokens": ["p"], "token_logprobs": []}}, "does the server support `echo`"),
        ({"logprobs": {"tokens": [1], "token_logprobs": [None]}}, "tokens are not text"),
        ({"logprobs": {"tokens": ["q", " a"], "token_logprobs": [None, -1]}}, "not those of the text"),
        ({"logprobs": {"tokens": ["q", " a"], "token_logprobs": [None, -1], "text_offset": [3, 0]}}, "not those of"),
        ({"logprobs": {"tokens": ["p", " a"], "token_logprobs": [None, 0.3]}}, "0.3 is not a log-probability"),
        ({"logprobs": {"tokens": ["p", " a"], "token_logprobs": [None, None]}}, "None is not a log-probability"),
        ({"logprobs": {"tokens": ["p", " a"], "token_logprobs": [None, "-1"]}}, "is not a log-probability"),
        ({"logprobs": {"tokens": ["p a"], "token_logprobs": [None]}}, "None is not a log-probability"),
    ],
)
def test_answers_that_are_no_log_probabilities_of_the_text(journal, choice, message):
    rows = [{"id": "0", "prompt": "p", "completions": [" a"]}]
    with scripted_server(broken(choice)) as http, pytest.raises(UserError, match=message):
        score_with_server(rows, settings(http.url, server={"max_retries": 0}), journal)
    assert len(journal) == 0


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": 3}, "the answer has no text"),
        ({"text": "a"}, "does the server support `logprobs`"),
        ({"text": "a", "logprobs": {"token_logprobs": [None]}}, "None is not a log-probability"),
        ({"message": {"content": "a"}, "logprobs": {"content": [{"logprob": 2}]}}, "2 is not a log-probability"),
        ({"message": "a"}, "the answer has no text"),
    ],
)
def test_generated_answers_without_their_log_probabilities(journal, choice, message):
    rows = [{"id": "0", "prompt": "p"}]
    answer = lambda asked: choices([choice, choice])  # noqa: E731
    with scripted_server(answer) as http, pytest.raises(UserError, match=message):
        score_with_server(rows, settings(http.url, generate={"n": 2}, server={"max_retries": 0}), journal)


def test_wrong_prompt_logprobs_and_messages_without_a_tokenizer(journal):
    tokenizer = resolve_model_path("builtin:pico-llama")
    rows = [{"id": "0", "prompt": "p", "completions": [" a"]}]
    for values in (None, [None], [None, {"7": {"logprob": -1.0}}] * 9):
        with (
            scripted_server(broken({"prompt_logprobs": values})) as http,
            pytest.raises(UserError, match="prompt_logp"),
        ):
            score_with_server(rows, settings(http.url, tokenizer=tokenizer, server={"max_retries": 0}), journal)
    messages = [{"id": "0", "prompt": [{"role": "user", "content": "p"}], "completions": ["a", "b"]}]
    with pytest.raises(UserError, match="a completions server takes text"):
        score_with_server(messages, settings("http://127.0.0.1:9/v1"), journal)


def test_rows_that_the_chat_template_refuses_are_skipped_and_counted(pico, journal, tmp_path):
    tokenizer = copy.deepcopy(pico.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    rows = [
        {"id": role, "prompt": [{"role": role, "content": "p"}], "completions": [" apple", " dog"]}
        for role in ("system", "user")
    ]
    with scripted_server(completions(pico)) as http:
        records, report = score_with_server(rows, settings(http.url, tokenizer=str(tmp_path)), journal)
    assert [record["id"] for record in records] == ["user"]
    assert report.left_out == {"refused by the chat template": 1}


def test_what_it_will_cost_is_said_before_anything_is_asked(pico, journal):
    told = []

    def agree(estimate):
        told.append(estimate)
        if estimate.requests:
            raise UserError("no")

    priced = {"price_in": 10.0, "price_out": 1000.0}
    with scripted_server(completions(pico)) as http:
        with pytest.raises(UserError, match="no"):
            score_with_server(ROWS, settings(http.url, server=priced), journal, agree)
        assert not http.asked
        _, report = score_with_server(ROWS, settings(http.url, server=priced), journal)
        score_with_server(ROWS, settings(http.url, server=priced), journal, agree)
    assert (told[0].requests, told[0].found, told[0].tokens_out) == (9, 0, 9)
    assert told[0].cost == pytest.approx((told[0].tokens_in * 10 + 9 * 1000) / 1e6)
    assert (told[1].requests, told[1].found, told[1].cost) == (0, 9, 0)
    assert report.cost == pytest.approx(9 * (10 * 10 + 1 * 1000) / 1e6)  # as the server counts


def test_unanswered_prompts_stop_or_are_counted(pico, journal):
    good = completions(pico)

    def answer(asked):
        return error(400) if "wolf" in asked.body["prompt"] else good(asked)

    with scripted_server(answer) as http:
        with pytest.raises(UserError, match="3 of 9 requests have no answer"):
            score_with_server(ROWS, settings(http.url), journal)
        assert len(journal) == 6
        records, report = score_with_server(ROWS, settings(http.url, on_no_answer="skip"), journal)
    assert [record["id"] for record in records] == ["0", "2"]
    assert report.left_out == {"no answer": 1} and report.found == 6
