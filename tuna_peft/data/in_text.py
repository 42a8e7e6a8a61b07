"""Lists, objects and messages that a cell of a table holds as text: in JSON, or as Python and pandas print them."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.messages import DIALOGUE_KEYS, PAIR_KEYS

# Keys that hold messages in some data set. Under any other key such a text may be a response that is JSON.
_MESSAGE_KEYS = frozenset((*DIALOGUE_KEYS, *PAIR_KEYS, "context", "conversation_a", "conversation_b"))
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(['"])(role|from|content|value)\1\s*:""")
_BETWEEN = re.compile(r"\}\s*\n\s*\{")  # numpy prints no comma between objects; in a string the newline is escaped


def parsed(value: Any, opening: str) -> Any:
    """What a text that begins with `opening` (`[` or `{`) stands for; any other value, and other text, unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    for parse in (json.loads, ast.literal_eval, lambda text: ast.literal_eval(_BETWEEN.sub("}, {", text))):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def with_messages(record: dict[str, Any]) -> dict[str, Any]:
    """The record with messages in the place of texts that stand for them; the same object if there are none."""
    found = {key: parsed(record[key], "[") for key in _MESSAGE_KEYS & record.keys() if is_messages(record[key])}
    return record | found if found else record


def is_messages(value: Any) -> bool:
    """Whether a text begins like a list of messages."""
    return isinstance(value, str) and value.lstrip()[:1] == "[" and _MESSAGES.match(value) is not None


def refuse_messages(value: Any, where: str) -> None:
    """Raises BadRow for a text that begins like a list of messages: `with_messages` could not read it."""
    if is_messages(value):
        what = f"a list of messages as text that cannot be read: {value[:60]!r} ..."
        fix = "Write the messages as a list in a .jsonl or Parquet file; spreadsheets cut cells at 32,767 characters."
        raise BadRow(what, reason="messages as text", where=where, fix=fix)
