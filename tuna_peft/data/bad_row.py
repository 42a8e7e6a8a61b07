"""`BadRow`: a record that cannot be used, and the wording that its messages share."""

from __future__ import annotations

from typing import Any

from tuna_peft.errors import UserError, listed

FIX_ROW = "Correct the record, or skip such records (in a recipe: `on_bad_row: skip`)."


class BadRow(UserError):
    """An invalid record in a valid file; it can be skipped, and is then counted under `reason`."""

    def __init__(self, what: str, *, reason: str, where: str | None = None, fix: str = FIX_ROW):
        super().__init__(what, where=where, fix=fix)
        self.reason = reason


def kind(value: Any) -> str:
    """What a value is, for messages: `a list`, `null`."""
    names = {str: "text", list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def check_unicode(text: str, where: str) -> None:
    """BadRow where half a surrogate pair ("\\ud83d") stands, which JSON can hold and Arrow and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"character {error.start} is half of a surrogate pair ({text[error.start]!r})"
        raise BadRow(what, reason="broken character", where=where) from None


def required(raw: dict[str, Any], key: str, where: str) -> Any:
    """The value of a key; BadRow if there is none."""
    if raw.get(key) is None:
        what = f"the record has no `{key}`, it has {listed(f'`{name}`' for name in raw)}"
        raise BadRow(what, reason="missing field", where=where)
    return raw[key]


def required_list(raw: dict[str, Any], key: str, where: str, length: int | None = None) -> list[Any]:
    """The list of a key, with `length` entries if that is given; BadRow for anything else."""
    values = required(raw, key, where)
    if not isinstance(values, list):
        raise BadRow(f"`{key}` is {type(values).__name__}, not a list", reason="wrong type", where=where)
    if length is not None and len(values) != length:
        raise BadRow(
            f"{length} responses, but {len(values)} entries in `{key}`",
            reason="different numbers of scores and responses",
            where=where,
        )
    return values
