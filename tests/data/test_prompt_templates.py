"""Prompts, against Stanford Alpaca's text and hand-written ones."""

import pytest

from tuna_peft.data.config import PromptConfig
from tuna_peft.data.templates import PromptTemplate
from tuna_peft.errors import UserError


def render(instruction, input=None, **config):
    return PromptTemplate(PromptConfig(**config)).render(instruction, input, "here")


def test_alpaca():
    assert render("Sort.", "b a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Response:"
    )
    assert render("Sort.") == render("Sort.", "") == render("Sort.", " \n") == without


def test_chat():
    assert render("Sort.", "b a", template="chat") == [{"role": "user", "content": "Sort.\n\nb a"}]
    assert render("Sort.", template="chat") == [{"role": "user", "content": "Sort."}]


def test_custom_text():
    config = {"template": "Q: {instruction} ({input})\nA:", "template_no_input": "Q: {instruction}\nA:"}
    assert render("Sort.", "b", **config) == "Q: Sort. (b)\nA:"
    assert render("Sort.", **config) == "Q: Sort.\nA:"
    assert render("Sort.", template="Q: {instruction} ({input})") == "Q: Sort. ()"


def test_braces_in_the_data_are_left_alone():
    assert render("Say {input} {x}", "{instruction}", template="{instruction}|{input}") == (
        "Say {input} {x}|{instruction}"
    )


@pytest.mark.parametrize("template", ["none", "Q: {instruction}"])
def test_an_input_is_never_dropped(template):
    assert "Sort." in render("Sort.", template=template)
    with pytest.raises(UserError) as caught:
        render("Sort.", "b a", template=template)
    assert caught.value.where == "here"
    assert "has an input" in caught.value.what
    assert "Add {input}" in caught.value.fix


@pytest.mark.parametrize("template", ["alpaca", "Q{1}: {instruction} ({input})\nA:"])
@pytest.mark.parametrize("input", [None, "b\n\na {instruction}"])
def test_a_prompt_gives_back_what_it_was_made_of(template, input):
    prompts = PromptTemplate(PromptConfig(template=template))
    prompt_workload = "Sort\nthis." if input is None else f"Sort\nthis.\n\n{input}"
    assert prompts.unwrap(prompts.render("Sort\nthis.", input)) == prompt_workload
    assert prompts.unwrap("of another template") == "of another template"
