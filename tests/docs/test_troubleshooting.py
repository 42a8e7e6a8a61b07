"""Every message that docs/troubleshooting.md explains exists in the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESSAGES = re.findall(
    r"^### `+(.*?)`+$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


def texts():
    """Every text of the package, with `…` for what is filled in."""
    found = set()
    for file in (ROOT / "tuna_peft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add(re.sub("…+", "…", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


TEXTS = texts()


def test_there_are_some():
    assert len(MESSAGES) > 30


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_exists(message):
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
    assert any(pattern.match(text) for text in TEXTS), "no text of the source begins like this any more"
