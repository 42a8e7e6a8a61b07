"""Spies that stand where something would be loaded, computed, written or sent."""

from __future__ import annotations

from typing import Any

import pytest


class Seen(Exception):
    """Raised by a spy that has nothing to return."""


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, result: Any = Seen) -> list[tuple[tuple, dict]]:
    """Replaces a function, and returns the list of its calls: positional arguments, named ones."""
    calls: list[tuple[tuple, dict]] = []

    def noted(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        if result is Seen:
            raise Seen
        return result

    monkeypatch.setattr(owner, name, noted)
    return calls
