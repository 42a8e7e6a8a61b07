"""Chat messages in every spelling that data sets use, as the `{"role", "content", ...}` that chat templates read.

Used by `ranked`, which turns prompts and responses into the ranked type.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from tuna_peft.data.bad_row import BadRow, check_unicode, kind

Message = dict[str, Any]

# Keys of dialogues: OpenAI's, ShareGPT's, that of WildChat and LMSYS, Gemini's, UltraInteract's.
DIALOGUE_KEYS = ("messages", "conversations", "conversation", "contents", "trajectory")
PAIR_KEYS = ("prompt", "chosen", "rejected", "chosen_messages", "rejected_messages", "rejected_response")

# ShareGPT's names and other common ones; the template decides about any other role.
_ROLES = {
    "human": "user", "prompter": "user", "instruction": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "bing": "assistant", "bard": "assistant", "chatbot": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "tool_result": "tool", "tool_results": "tool", "ipython": "tool",
}  # fmt: skip
# As a role or as the type of a part: the text is the call, in JSON. Anthropic's `tool_use` is an object.
_CALLS = ("function_call", "tool_call", "tool_use")
_CONTENTS = ("content", "value", "text", "parts")  # OpenAI's, ShareGPT's, OpenAssistant's and Gemini's
_REASONING = ("reasoning", "thinking")
# What a template may read besides role and content. Other keys (time stamps, weights, ...) are not passed on.
_EXTRAS = ("reasoning_content", "thinking", "name", "tool_call_id")


def clean_message(raw: Any, where: str) -> Message:
    """One message with `role`, `content` (text) and, where given, `tool_calls` and the other keys of templates.

    Reads `role`/`content` and `from`/`value`, content in parts of text, calls as OpenAI and as ShareGPT write them.
    The arguments of a call become an object, which is what templates expect.

    Raises:
        BadRow: There is no role, or the content is not text.
    """
    role = raw.get("role", raw.get("from")) if isinstance(raw, dict) else None
    if not isinstance(role, str):
        raise BadRow(f"a message is {kind(raw)} without a `role` (or `from`)", reason="wrong type", where=where)
    raw = _result_of_tool(raw)
    role = raw.get("role", role)
    spelled, role = role.lower(), _ROLES.get(role.lower(), role.lower())
    calls = raw.get("tool_calls") or ([raw["function_call"]] if raw.get("function_call") else [])
    content, reasoning, more_calls = _divide(_first(raw, *_CONTENTS), where)
    calls = calls or more_calls
    if spelled in _CALLS and isinstance(content, str) and not calls:
        calls, content = _parse(content, where), None
    text = "" if content is None and calls else content_text(content, where)
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = [_clean_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    return message | reasoning | {key: raw[key] for key in _EXTRAS if raw.get(key)}


def _divide(content: Any, where: str) -> tuple[Any, dict[str, str], list[Any]]:
    """Content in parts as its other parts, the reasoning (an entry of a message, if any) and the tool calls."""
    if not isinstance(content, list):
        return content, {}, []
    left, reasoning, calls = [], [], []
    for part in content:
        name = part.get("type") if isinstance(part, dict) else None
        if name in _REASONING:
            reasoning.append(_text_of(part))
        elif name in _CALLS:
            calls.append(_parse(value, where) if isinstance(value := part.get("value", part), str) else value)
        else:
            left.append(part)
    if not all(isinstance(text, str) for text in reasoning):
        raise BadRow("a part with reasoning has no text", reason="wrong type", where=where)
    found = {"reasoning_content": "".join(reasoning)} if any(reasoning) else {}
    return (left if left or not calls else None), found, calls


def _text_of(part: dict[str, Any]) -> Any:
    """The text of a part of content, in the spellings of OpenAI, Anthropic and LLaMA-Factory."""
    return _first(part, "text", "value", "thinking")


def _first(found: dict[str, Any], *keys: str) -> Any:
    """The first value that is not null."""
    return next((found[key] for key in keys if found.get(key) is not None), None)


def _result_of_tool(raw: Any) -> Any:
    """Anthropic's result of a tool, a part of a message of the user, as a message of the tool; others unchanged."""
    parts = raw.get("content")
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
        return raw
    [part] = parts
    if part.get("type") != "tool_result":
        return raw
    return {"role": "tool", "content": part.get("content"), "tool_call_id": part.get("tool_use_id")}


def content_text(content: Any, where: str) -> str:
    """The content as text; a list of text parts is joined.

    Raises:
        BadRow: It is not text, or one of its parts is not (an image, a sound).
    """
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"expected text, found {kind(content)}", reason="wrong type", where=where)
    check_unicode(content, where)
    return content


def message_text(message: Message) -> str:
    """A message for people and judges: its reasoning, its text and its tool calls in JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    reasoning = message.get("reasoning_content") or message.get("thinking")
    return "\n".join(filter(None, [reasoning, message["content"], *calls]))


def clean_tools(tools: Any, where: str) -> list[Any] | None:
    """The descriptions of the tools that a record may call: a list, or JSON of one; None without any.

    Raises:
        BadRow: It is something else.
    """
    tools = _parse(tools, where) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"`tools` is {kind(tools)}, not a list of objects", reason="wrong type", where=where)
    return [_without_nulls(tool) for tool in tools]


def _clean_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("an entry of `tool_calls` has no function name", reason="wrong type", where=where)
    arguments = _first(function, "arguments", "parameters", "input") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # what is no JSON reaches the template as text
            arguments = json.loads(arguments)
    cleaned = {"type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}
    return cleaned | ({"id": call["id"]} if call.get("id") else {})


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds when rows have different ones."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
        text = _text_of(part)
        part = part if text is None else text
    if isinstance(part, str):
        return part
    name = part.get("type", "text") if isinstance(part, dict) else kind(part)
    raise BadRow(
        f"the content has a part of type `{name}`; only text is read",
        reason="content that is not text",
        where=where,
        fix="Remove the part or the record, or skip such records (in a recipe: `on_bad_row: skip`).",
    )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        what = f"a tool call or a list of tools is not JSON ({error}): {text[:60]!r}"
        raise BadRow(what, reason="tools are not JSON", where=where) from None
