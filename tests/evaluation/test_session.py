"""What a session generates, and what it has in its journal already."""

from __future__ import annotations

import pytest
import torch

from tuna_peft.evaluation import session as module
from tuna_peft.evaluation.session import Question, Session
from tuna_peft.journal import Journal
from tuna_peft.models.generation.generate import Generated

CONTEXT, NEW = 10, 4


def questions(*lengths):
    return [Question(f"q{place}", "text", "prompt", ids=[5] * length) for place, length in enumerate(lengths)]


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Asks a session with a journal that outlives it; `ask.generated` lists the lengths of generated prompts."""
    generated = []

    def stream(model, tokenizer, prompts, *, max_new_tokens, batch_size, done, dense, description):
        assert batch_size == 3 and not dense
        for place, prompt in enumerate(prompts):
            if place not in done:
                generated.append(len(prompt))
                yield Generated(place, [f"{len(prompt)} in, {max_new_tokens} out"], [1], [len(prompt) > 1])

    monkeypatch.setattr(module, "stream_responses", stream)
    monkeypatch.setattr(module, "context_of", lambda model: CONTEXT)

    def run(asked, new=NEW, dtype=torch.float32, **digest):
        with Journal(tmp_path / "journal.jsonl") as journal:
            digest = {"base": "b", "quantization": None, "adapters": {"sft": "hash"}, **digest}
            model = torch.nn.Linear(1, 1, dtype=dtype)
            model.dtype = dtype
            session = Session(tmp_path, "sft", digest, model, None, journal, batch_size=3)
            return session.answers(asked, new, "task")

    run.generated = generated
    return run


def test_a_prompt_fits_if_the_longest_answer_does(ask):
    answers, [excluded] = ask(questions(CONTEXT - NEW + 1, CONTEXT - NEW, 1))
    assert [answer.question.id for answer in answers] == ["q1", "q2"]
    assert [(answer.text, answer.ended) for answer in answers] == [("6 in, 4 out", True), ("1 in, 4 out", False)]
    assert (excluded.count, excluded.names) == (1, ["q0"]) and "no room for 4 new tokens" in excluded.reason


def test_equal_prompts_are_generated_once_and_known_answers_never(ask):
    answers, _ = ask(questions(3, 2, 3))
    assert [answer.text for answer in answers] == ["3 in, 4 out", "2 in, 4 out", "3 in, 4 out"]
    assert ask.generated == [3, 2]
    assert ask(questions(2, 3, 1))[0][0].text == "2 in, 4 out"
    assert ask.generated == [3, 2, 1]


def test_a_size_is_found_once_for_each_task(tmp_path):
    asked = []

    def size(rows, new_tokens):
        asked.append((rows, new_tokens))
        return 100 - len(asked)

    def session(journal, batch_size=size):
        return Session(tmp_path, "sft", {}, None, None, journal, batch_size)

    with Journal(tmp_path / "journal.jsonl") as journal:
        assert session(journal, 5).size("graded", [(3, (0,))], 7) == 5
        assert session(journal).size("graded", [(3, (0,))], 7) == 99
        assert session(journal).size("ranking", [(3, (4, 2))]) == 98
        assert asked == [([(3, (0,))], 7), ([(3, (4, 2))], None)]
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert session(journal).size("graded", [(3, (0,))], 7, begun=True) == 99
        assert session(journal).size("superni", [(3, (0,))], 7, begun=True) == 32  # begun before sizes were recorded


@pytest.mark.parametrize(
    "other",
    [{"new": 5}, {"dtype": torch.bfloat16}, {"base": "other"}, {"quantization": "nf4"}, {"adapters": {"sft": "new"}},
     {"adapters": {}}],
)  # fmt: skip
def test_another_model_or_length_answers_anew(ask, other):
    for changes in ({}, other, {}, other):
        [answer], _ = ask(questions(3), **changes)
        assert answer.text == f"3 in, {changes.get('new', NEW)} out"
    assert ask.generated == [3, 3]
    ask(questions(3), adapters={"renamed": "hash"})  # the weights count, not their names
    assert ask.generated == [3, 3]
