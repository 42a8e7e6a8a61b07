"""The prompt template of pico-LLaMA: Alpaca's headings without its preamble, which would double a short prompt."""

from __future__ import annotations

INSTRUCTION_HEADING = "### Instruction:\n"
INPUT_HEADING = "\n\n### Input:\n"
RESPONSE_HEADING = "\n\n### Response:\n"

WITH_INPUT = INSTRUCTION_HEADING + "{instruction}" + INPUT_HEADING + "{input}" + RESPONSE_HEADING
WITHOUT_INPUT = INSTRUCTION_HEADING + "{instruction}" + RESPONSE_HEADING

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% set parts = message['content'].split('\\n\\n', 1) %}"
    "{{ '### Instruction:\\n' + parts[0] }}"
    "{% if parts | length > 1 %}{{ '\\n\\n### Input:\\n' + parts[1] }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('pico-LLaMA knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
"""The same prompt from messages: in a user message, what follows the first empty line is the input."""


def render_prompt(instruction: str, input: str = "") -> str:
    """The prompt that a response follows directly."""
    if input:
        return WITH_INPUT.format(instruction=instruction, input=input)
    return WITHOUT_INPUT.format(instruction=instruction)
