"""Ollama's rules for templates, as far as Modelfiles of this package need them.

Go's text/template with `if`, `range`, variables, `eq`, `and`, `len`, `slice`, `template`, and what Ollama does before:
it merges neighboring messages of one role and joins all system messages. Compared with Ollama's own `template` package
when it was written: equal on every template and conversation of test_modelfile.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[()]|:=|=|,|[$.\w]+')


class TemplateFailure(Exception):
    """Go stopped with an error."""


def template_of(modelfile: Path) -> str | None:
    """The text between the triple quotes of TEMPLATE."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', modelfile.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return found and found[1]


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The prompt that Ollama makes of a conversation, without the BOS that llama.cpp adds.

    Raises:
        TemplateFailure: The template refuses the conversation.
    """
    assert ".Messages" in template, "Ollama renders such a template turn by turn"
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {**message, "content": merged[-1]["content"] + "\n\n" + message["content"]}
        else:
            merged.append(message)
    root = {
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Messages": [{"Role": message["role"], "Content": message["content"]} for message in merged],
    }
    nodes, rest, _ = _parse(_lex(template))
    assert not rest
    out: list[str] = []
    _run(nodes, root, {"$": root}, out)
    return "".join(out)


def _lex(template: str) -> list[tuple[str, str]]:
    """Texts and actions; `{{-` and `-}}` take the white space beside them."""
    parts, position = [], 0
    for action in re.finditer(r'\{\{(- )?((?:"(?:\\.|[^"\\])*"|[^"}])*?)( -)?\}\}', template):
        text = template[position : action.start()]
        if parts and parts[-1][0] == "action-":
            text = text.lstrip()
        parts += [("text", text.rstrip() if action[1] else text), ("action-" if action[3] else "action", action[2])]
        position = action.end()
    return [*parts, ("text", template[position:])]


def _parse(parts: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]], str]:
    """Nodes up to the `else` or `end` that closes the block, what follows it, and that word."""
    nodes: list[Any] = []
    while parts:
        (kind, text), parts = parts[0], parts[1:]
        if kind == "text":
            nodes.append(text)
            continue
        words = _TOKEN.findall(text)
        if words[0] in ("end", "else"):
            return nodes, parts, text.strip()
        if words[0] not in ("if", "range"):
            nodes.append((words,))
            continue
        node = (words, branches := [])
        nodes.append(node)
        body, parts, closing = _parse(parts)
        branches.append(body)
        if closing.startswith("else if"):
            body, parts, closing = _parse([("action", closing.removeprefix("else ")), *parts])
            branches.append(body)  # its `end` closed this block too
            continue
        if closing == "else":
            body, parts, closing = _parse(parts)
            branches.append(body)
        assert closing == "end"
    return nodes, parts, "end"


def _run(nodes: list[Any], dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
            continue
        words = node[0]
        if words[0] == "if":
            branch = 0 if _value(words[1:], dot, variables) else 1
            _run(node[1][branch] if branch < len(node[1]) else [], dot, variables, out)
        elif words[0] == "range":
            _, index, _, element, _, *listed = words
            for number, item in enumerate(_value(listed, dot, variables)):
                variables[index] = number
                variables[element] = item
                _run(node[1][0], item, variables, out)
        elif words[0] == "template":
            raise TemplateFailure(json.loads(words[1]))
        elif words[1:2] in ([":="], ["="]):
            variables[words[0]] = _value(words[2:], dot, variables)
        else:
            out.append(_value(words, dot, variables))


def _value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    values: list[Any] = []
    position = 0
    while position < len(words):
        word = words[position]
        if word == "(":
            depth, end = 1, position
            while depth:
                end += 1
                depth += {"(": 1, ")": -1}.get(words[end], 0)
            values.append(_value(words[position + 1 : end], dot, variables))
            position = end
        elif word in ("eq", "and", "len", "slice"):
            values.append(word)
        elif word[0] == '"':
            values.append(json.loads(word))
        elif word.isdigit():
            values.append(int(word))
        elif word in ("true", "false"):
            values.append(word == "true")
        else:
            start, *fields = word.split(".")
            value = variables[start] if start else dot
            for field in fields:
                value = value[field]
            values.append(value)
        position += 1
    functions = {
        "eq": lambda a, b: a == b, "len": len, "slice": lambda listed, start: listed[start:],
        "and": lambda *given: next((value for value in given if not value), given[-1]),
    }  # fmt: skip
    return functions[values[0]](*values[1:]) if words[0] in functions else values[0]
