"""Strict JSON: what the standard library accepts and a user never means is refused."""

from __future__ import annotations

import json

import pytest

from tuna_peft.errors import UserError
from tuna_peft.json_text import Decoder, Rejected, parse_json, read_json

REFUSED = {
    "given twice": '{"a": 1, "b": {"c": 2, "c": 3}}',
    "nested too deeply": "[" * 200_000 + "]" * 200_000,
    "5,000 digits": "[" + "7" * 5000 + "]",
    "301 digits": "[" + "7" * 301 + "]",
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(why):
    with pytest.raises(Rejected, match=why):
        parse_json(REFUSED[why])
    with pytest.raises(Rejected, match=why):
        Decoder().raw_decode(REFUSED[why])


def test_all_else_is_what_the_standard_library_says():
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\udc1f"], "b": {"a": {}}, "c": ' + "9" * 300 + "}"
    assert parse_json(text) == json.loads(text)
    assert float(parse_json(text)["c"]) < float("inf")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', None])
def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path, content):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="not a valid list of cats") as caught:
        read_json(file, "list of cats")
    assert caught.value.where == str(file)
