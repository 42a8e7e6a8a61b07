"""Reads a YAML file as plain data and notes the line of every key, so that an error can name it.

`layers` calls this for a recipe, for what it extends and for the values of overrides.

The scalars are those of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema), without hexadecimal and
octal integers. PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false, `012` is ten and `2024-01-01` is a date;
each of them would silently change a correct recipe.

A recipe may come from a stranger, so size, depth and what aliases expand to are bounded, and whatever PyYAML raises
becomes a `UserError` with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from tuna_peft.errors import UserError

KeyPath = tuple[str | int, ...]

# Far above any recipe: a shipped one has under 10 kB, 8 levels and 200 values.
MAX_BYTES = 1 << 20
MAX_DEPTH = 100
MAX_VALUES = 100_000
MAX_DIGITS = 20  # a 64-bit integer has 19 or 20; pydantic cannot convert some hundred digits to a float

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _MERGE, _STR = (_TAG + name for name in ("null", "bool", "int", "float", "merge", "str"))
_FLOAT_PATTERN = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _RecipeLoader(yaml.SafeLoader):
    """Composes nodes with the tags of YAML 1.2; `_Converter`, not PyYAML, turns them into data."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# The order counts: the first pattern that matches wins, and every integer also looks like a float.
_RecipeLoader.add_implicit_resolver(_NULL, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_RecipeLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_RecipeLoader.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+0123456789."))
_RecipeLoader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])

# By tag: a value may also be tagged by hand (`!!int abc`), so each of these can fail with a ValueError or KeyError.
_SCALARS: dict[str, Callable[[str], Any]] = {
    _NULL: lambda text: None,
    _BOOL: lambda text: {"true": True, "false": False}[text.lower()],
    _INT: int,
    _FLOAT: lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    _MERGE: str,  # `<<` as a value is text
    _STR: str,
}


class RecipeDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # equal lists are written out twice rather than as `&id001`


RecipeDumper.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+0123456789."))


@dataclass
class Document:
    """Plain data and where each key of it was written.

    Attributes:
        data: Dictionaries, lists and scalars.
        places: `file:line`, or the override, by path of keys.
        folders: The folders of the files it was read from: the recipe's own, then those of what it extends.
    """

    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where `path`, or the nearest key above it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def dotted(self, path: KeyPath) -> str:
        """`("stages", 0, "lora", "r")` as `stages.sft.lora.r`: stages by name where they have one."""
        text, data = "", self.data
        for key in path:
            data = _item(data, key)
            name = data.get("name") if text == "stages" and isinstance(data, dict) else None
            if isinstance(key, int) and not isinstance(name, str):
                text += f"[{key}]"
            else:
                text += f".{name or key}" if text else str(key)
        return text


def _item(data: Any, key: str | int) -> Any:
    try:
        return data[key]
    except (KeyError, IndexError, TypeError):
        return None


def read_document(file: str | Path) -> Document:
    """Reads one recipe file; `layers.read_recipe` adds what it extends.

    Raises:
        UserError: The file cannot be read, is not UTF-8 or not YAML, is too large, repeats a key, or is no mapping.
    """
    path = Path(file)
    try:
        with open(path, "rb") as source:
            content = source.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the recipe: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"not UTF-8 text (byte {error.start})", where=f"{path}:{line}", fix="Save it as UTF-8."
        ) from error
    if len(content) > MAX_BYTES:
        raise UserError("too large for a recipe: over 1 MB", where=str(path), fix="Is this a data file?")
    document = parse_document(text, str(path))
    document.folders = [path.parent]
    return document


def parse_document(text: str, file: str) -> Document:
    """Like `read_document`, for text that is already in memory; `file` is the name used in errors."""
    converter = _Converter(file)
    node = _compose(text, file)
    if node is None:
        raise UserError("the recipe is empty", where=file, fix="Start from one: `tuna-peft recipes list`.")
    data = converter.value(node, ())
    if not isinstance(data, dict):
        raise UserError("a recipe is a mapping of keys, such as `name: my-run`", where=file)
    return Document(data, converter.places)


def parse_value(text: str) -> Any:
    """One value in YAML, as an override gives it: `1e-5`, `[q_proj, v_proj]`, `{r: 8}`, `null`."""
    return parse_document(f"value: {text}", "value").data["value"]


def _compose(text: str, file: str) -> yaml.Node | None:
    """Syntax only: the tree of nodes, or None where there is no document."""
    loader: _RecipeLoader | None = None
    try:
        loader = _RecipeLoader(text)
        return loader.get_single_node()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes such as "\UFFFFFFFF"
        mark = getattr(error, "problem_mark", None) or (loader.get_mark() if loader else None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"not valid YAML: {reason}",
            where=f"{file}:{line + 1}",
            fix="Check indentation (no tabs), colons and quotes.",
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Converter:
    """Turns YAML nodes into plain data and notes the place of every key in `places`."""

    def __init__(self, file: str):
        self.file = file
        self.places: dict[KeyPath, str] = {}
        self.count = 0
        self.parents: list[int] = []

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places.setdefault(path, self.where(node))
        self.count += 1
        if self.count > MAX_VALUES:
            # Nine lines of aliases to lists of aliases expand to 10^9 values. `path[:1]` is the key that is too large,
            # the node itself is in the list at the end of the aliases.
            what = f"more than {MAX_VALUES:,} values, counting what aliases stand for"
            raise UserError(what, where=self.places[path[:1]], fix="Use fewer aliases.")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            raise self.unknown_tag(node)
        if id(node) in self.parents:
            raise self.error(node, "an alias contains itself", "Write the value out.")
        if len(self.parents) == MAX_DEPTH:  # aliases inside aliases are deeper than the text
            raise self.error(node, f"nested more than {MAX_DEPTH} levels deep", "Use fewer aliases.")
        self.parents.append(id(node))
        data = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.parents.pop()
        return data

    def sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for merged in self.merged(node):
            data.update(self.value(merged, path))
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                shown = repr(key) if isinstance(key_node, yaml.ScalarNode) else "that is a list or a mapping"
                raise self.error(key_node, f"the key {shown} is not text", "Put it in quotes.")
            if key in lines:
                what = f"the key `{key}` is given twice, first in line {lines[key]}"
                raise self.error(key_node, what, "Remove one of them.")
            lines[key] = key_node.start_mark.line + 1
            self.places[path + (key,)] = self.where(key_node)
            data[key] = self.value(value_node, (*path, key))
        return data

    def merged(self, node: yaml.MappingNode) -> list[yaml.MappingNode]:
        """The mappings of `<<: *defaults` or `<<: [*a, *b]`, in the order in which later ones win."""
        found: list[yaml.MappingNode] = []
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                if not all(isinstance(part, yaml.MappingNode) for part in parts):
                    raise self.error(key_node, "`<<` merges mappings only", None)
                found += reversed(parts)  # YAML: earlier mappings of the list win
        return found

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _SCALARS:
            raise self.unknown_tag(node)
        text = str(node.value)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise self.error(node, "half of a surrogate pair, which is no character", "Write the character itself.")
        if node.tag == _INT and len(digits := text.lstrip("+-0")) > MAX_DIGITS:
            raise self.error(
                node,
                f"an integer of {len(digits):,} digits",
                f"Write at most {MAX_DIGITS} digits, or a float such as 1e30.",
            )
        try:
            return _SCALARS[node.tag](text)
        except (ValueError, KeyError) as error:
            kind = node.tag.removeprefix(_TAG)
            raise self.error(node, f"{text[:40]!r} is not a value of type {kind}", f"Remove `!!{kind}`.") from error

    def unknown_tag(self, node: yaml.Node) -> UserError:
        tag = node.tag.replace(_TAG, "!!")[:80]
        return self.error(node, f"not valid YAML here: the tag `{tag}`", "Remove the tag; recipes hold plain data.")

    def error(self, node: yaml.Node, what: str, fix: str | None) -> UserError:
        return UserError(what, where=self.where(node), fix=fix)

    def where(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"
