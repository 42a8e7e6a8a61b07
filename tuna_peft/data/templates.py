"""Prompt templates: they turn an instruction and its input into a prompt. Used by `readers`."""

from __future__ import annotations

import re

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.config import PromptConfig
from tuna_peft.data.ranked import Prompt

# Word for word Stanford Alpaca's (github.com/tatsu-lab/stanford_alpaca, train.py): no newline after "Response:".
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class PromptTemplate:
    """Renders instructions as prompts, with the template of a `PromptConfig`.

    Attributes:
        with_input: The template with `{instruction}` and `{input}`.
        no_input: The template with `{instruction}` for records without an input.
    """

    def __init__(self, config: PromptConfig):
        self.name = config.template
        if config.template == "alpaca":
            self.with_input, self.no_input = ALPACA_INPUT, ALPACA_NO_INPUT
        elif config.template in ("chat", "none"):
            self.with_input = self.no_input = "{instruction}"
        else:
            self.with_input = config.template
            self.no_input = config.template_no_input or config.template

    def render(self, instruction: str, input: str | None = None, where: str | None = None) -> Prompt:
        """The prompt: text, or for `chat` a list with one user message.

        Args:
            instruction: The task.
            input: The input of the task; None, empty and blank text all mean that there is none.
            where: The record's place, for the error.

        Raises:
            BadRow: There is an input, but the template has no `{input}`.
        """
        if self.name == "chat":
            content = f"{instruction}\n\n{input}" if input and input.strip() else instruction
            return [{"role": "user", "content": content}]
        if not input or not input.strip():
            return _fill(self.no_input, instruction, "")
        if "{input}" not in self.with_input:
            raise BadRow(
                "the record has an input, but the prompt template has no {input}",
                reason="input without {input} in the template",
                where=where,
                fix="Add {input} to the template, or use `template: alpaca`.",
            )
        return _fill(self.with_input, instruction, input)

    def unwrap(self, prompt: str) -> str:
        """The inverse of `render`: instruction and input with a blank line between; other text stays unchanged."""
        for template in (self.with_input, self.no_input):
            around = re.split(r"\{instruction\}|\{input\}", template)
            if match := re.fullmatch("(.*)".join(map(re.escape, around)), prompt, re.DOTALL):
                return "\n\n".join(filter(None, match.groups()))
        return prompt


def _fill(template: str, instruction: str, input: str) -> str:
    # One pass, so that braces in the data (and an instruction that says "{input}") stay as they are.
    values = {"{instruction}": instruction, "{input}": input}
    return re.sub(r"\{instruction\}|\{input\}", lambda match: values[match.group()], template)
