"""Markdown that values cannot break out of, read back by a parser of CommonMark."""

import re

import pytest
from markdown_it import MarkdownIt
from markupsafe import Markup

from tuna_peft.markup import code, fenced, markdown, plural, quote, render, table

HOSTILE = [
    "# heading", "  ## heading", "###### heading #", "- item", "+ item", "* item", "1. item", "12) item", "---", "===",
    "> quote", "    indented", "\tindented", "```sh", "~~~", "<b>tag</b>", "<!-- comment", "<https://a.b>", "&lt;",
    "&#35; x", "*em*", "__strong__", "_em_", "snake_case", "~~gone~~", "[a](b)", "![a](b)", "[a]: http://b", "a`b`",
    "$x$", "a\\", "\\*a*", "a|b", "|a|\n|-|", "https://a.b", "www.a.b", "line\nnext\n===", "a\r# b", "x\x0b# y",
    "a\u2028# b", "0.458", "1.", "2) ", "",
]  # fmt: skip


def tokens(text):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def shown(inline):
    assert {child.type for child in inline.children} <= {"text"}, inline.children
    return "".join(child.content for child in inline.children)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_is_one_paragraph_of_the_same_text(text):
    found = tokens(str(markdown(text)))
    expected = " ".join(text.split())
    assert [token.type for token in found] == (["paragraph_open", "inline", "paragraph_close"] if expected else [])
    assert "".join(shown(token) for token in found if token.type == "inline") == expected


@pytest.mark.parametrize("text", HOSTILE)
def test_a_value_is_one_cell_of_a_table(text):
    found = tokens(str(table([{"name": "first", text or "other": text, "last": code("a|b")}])))
    cells = [token for token in found if token.type == "inline"]
    assert [token.type for token in found].count("th_open") == [token.type for token in found].count("td_open") == 3
    assert shown(cells[4]) == " ".join(text.split())
    assert [child.type for child in cells[5].children] == ["code_inline"] and cells[5].children[0].content == "a|b"


def test_a_quotation_holds_all_lines_and_nothing_else():
    text = "\n".join(line for line in HOSTILE if "\n" not in line)
    kinds = {token.type for token in tokens(str(quote(text)))}
    assert kinds == {f"{kind}_{end}" for kind in ("blockquote", "paragraph") for end in ("open", "close")} | {"inline"}


@pytest.mark.parametrize("text", ["a", "`a`", "a ``b`` c", "*a*", "<b>", "a\\"])
def test_code_shows_what_it_is_given(text):
    [_, inline, _] = tokens(str(code(text)))
    assert [(child.type, child.content) for child in inline.children] == [("code_inline", text)]
    [block] = tokens(str(fenced(f"```\n{text}\n````", "sh")))
    assert (block.type, block.info, block.content) == ("fence", "sh", f"```\n{text}\n````\n")


def test_finished_text_is_kept():
    assert markdown(Markup("*a*")) == "*a*" and table([{"a": code("b")}]).endswith("| `b` |")
    assert re.fullmatch(r"\| a \| b \|\n\| --- \| ---: \|\n\| 1 \|  \|", table([{"a": 1, "b": ""}], numbers=True))
    assert (plural(1, "prompt"), plural(1200, "prompt")) == ("1 prompt", "1,200 prompts")


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(Exception, match="is undefined"):
        render("evaluation/report/report.md.jinja", rows=[], excluded=[])
