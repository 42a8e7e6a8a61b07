"""A dialogue: earlier turns are seen, stages are switched, answers come in pieces and may be stopped."""

from __future__ import annotations

import contextlib

import pytest
from tiny_llama import write_base, write_stack

from tuna_peft import AdapterStack, UserError
from tuna_peft.data.config import PromptConfig
from tuna_peft.models.generation.conversation import Conversation, Pieces
from tuna_peft.models.generation.generate import generate_responses

OPTIONS = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 6, "seed": 0}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_stack(folder / "stack", write_base(folder / "base"))
    loaded = AdapterStack.from_pretrained(folder / "stack", device="cpu")
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture
def chat(stack):
    """Starts dialogues, which end with the test."""
    with contextlib.ExitStack() as dialogues:

        def start(template="chat"):
            return dialogues.enter_context(contextlib.closing(Conversation(stack, PromptConfig(template=template))))

        yield start


def ignore(piece):
    pass


def test_pieces_join_to_the_response_and_earlier_turns_are_in_the_prompt(stack, chat):
    conversation, pieces = chat(), []
    first = conversation.ask("w3 w4", pieces.append, **OPTIONS)
    assert "".join(pieces) == first.text and not first.stopped
    second = conversation.ask("w5", ignore, **OPTIONS)
    ids = stack.tokenizer(f"w3 w4 {first.text} w5 ").input_ids
    assert second.text == generate_responses(stack.model, stack.tokenizer, [ids], max_new_tokens=6)[0]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    conversation.reset()
    assert conversation.ask("w3 w4", ignore, **OPTIONS) == first


def test_stages_answer_as_they_do_alone(stack, chat):
    conversation = chat("{instruction} ")
    assert conversation.stages == ["base", "sft", "ranking"] and conversation.stage == "ranking"
    answers = conversation.compare("w3 w4", **OPTIONS)
    for stage, names in (("base", []), ("sft", ["sft"]), ("ranking", ["sft", "ranking"])):
        conversation.switch(stage)
        assert conversation.ask("w3 w4", ignore, **OPTIONS).text == answers[stage].text
        assert list(stack.model.active_adapters) == (names or ["sft", "ranking"])  # `base` disables them
    layer = next(module for module in stack.model.modules() if hasattr(module, "lora_A"))
    conversation.switch("sft")
    conversation.ask("w3 w4", ignore, **OPTIONS)
    assert "forward" in vars(layer)  # dense weights are kept for the next question
    conversation.close()
    assert list(stack.model.active_adapters) == ["sft", "ranking"] and "forward" not in vars(layer)
    assert len({reply.text for reply in answers.values()}) == 3  # the fixture's adapters are far from zero
    with pytest.raises(UserError, match="no stage 'rankin'") as caught:
        conversation.switch("rankin")
    assert "ranking" in str(caught.value)


def test_a_comparison_repeats_the_last_question_in_its_place_and_is_not_remembered(chat):
    conversation = chat()
    with pytest.raises(UserError, match="no question"):
        conversation.compare(None, **OPTIONS)
    conversation.ask("w3 w4", ignore, **OPTIONS)
    last = conversation.ask("w5", ignore, **OPTIONS)
    before = list(conversation.messages)
    assert conversation.compare(None, **OPTIONS)["ranking"] == last
    assert conversation.messages == before


def test_ctrl_c_keeps_what_was_said(stack, chat):
    conversation, pieces = chat(), []

    def stop_at_the_second(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    reply = conversation.ask("w3 w4", stop_at_the_second, **OPTIONS)
    assert reply.stopped and "".join(pieces).startswith(reply.text) and reply.text
    assert conversation.messages[-1]["content"] == reply.text
    assert list(stack.model.active_adapters) == ["sft", "ranking"]


def test_the_first_turns_are_left_out_when_the_context_is_full(monkeypatch, chat):
    conversation = chat()
    for _ in range(4):
        conversation.ask("w3 w4", ignore, **OPTIONS)
    assert conversation.forgotten == 0
    monkeypatch.setattr("tuna_peft.models.generation.conversation.context_of", lambda model: 24)
    conversation.ask("w3 w4", ignore, **OPTIONS)
    assert conversation.forgotten in (4, 6) and len(conversation.messages) == 10


def test_without_a_chat_template_each_question_stands_alone(chat):
    conversation = chat("{instruction} ")
    assert not conversation.remembers
    first = conversation.ask("w3 w4", ignore, **OPTIONS)
    assert conversation.ask("w3 w4", ignore, **OPTIONS) == first


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


def test_no_half_characters_and_no_white_space_around():
    shown = []
    pieces = Pieces(Bytes(), shown.append)
    text = "  é 🐟\n\nb \n"
    for byte in text.encode():
        pieces.add(byte)
    pieces.end(text.strip())
    assert "".join(shown) == text.strip() and "\ufffd" not in "".join(shown)
    assert shown[0] == "é" and " 🐟" in shown
