"""Templates of pages and Markdown files. Whatever a value holds, it becomes text: no tag, heading or table cell.

The report and the model card are rendered here. Templates lie beside the modules that use them; values that are
finished HTML or Markdown have the type `Markup`, everything else is escaped by the kind of the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, **values: Any) -> str:
    """The text of a template, named by its path inside the package, such as `export/card.md.jinja`."""
    return _environment(html=template.endswith(".html.jinja")).get_template(template).render(values)


@cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("tuna_peft", ""),
        autoescape=html,
        finalize=None if html else markdown,
        undefined=StrictUndefined,  # a misspelled name is an error, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "fenced": fenced, "plural": plural, "quote": quote, "table": table}
    return environment


def markdown(value: Any) -> Markup:
    """A value in one line of Markdown, as plain text: without tags, headings, lists, emphasis, links or formulas."""
    if hasattr(value, "__html__"):
        return Markup(value)
    text = re.sub(r"([\\`*\[\]{}#|!~$]|:(?=//)|(?<=www)\.)", r"\\\1", escape_tags(re.sub(r"\s+", " ", str(value))))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word an underscore is no emphasis
    text = re.sub(r"^( ?)([-+=])|^( ?\d+)(?=[.)](?: |$))", r"\1\3\\\2", text)
    return Markup(text)


def escape_tags(text: str) -> str:
    """Tags and entities as text. Quotation marks are left: they mean nothing outside of a tag."""
    return str(escape(text)).replace("&#34;", '"').replace("&#39;", "'")


def quote(text: str) -> Markup:
    """A Markdown quotation, line by line."""
    return Markup("\n".join(f"> {markdown(line)}".rstrip() for line in text.strip().splitlines()))


def code(text: str) -> Markup:
    """A Markdown code span."""
    text = " ".join(text.split())
    fence = "`" * (_longest_backticks(text) + 1)
    space = " " if "`" in text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def fenced(text: str, language: str = "") -> Markup:
    """A Markdown code block, fenced by more backticks than it has in a row."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def table(rows: Sequence[Mapping[str, Any]], numbers: bool = False) -> Markup:
    """A Markdown table with a column for each key of the rows; `numbers` aligns all but the first to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] + ["---:" if numbers else "---"] * (len(columns) - 1)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    lines[0] = [_cell(column) for column in columns]
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def plural(count: int, noun: str) -> str:
    """`1 prompt`, `1,200 prompts`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _cell(value: Any) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", str(markdown(value)))


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
