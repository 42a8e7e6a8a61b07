"""A YAML file as plain data, with the place of every key, so that an error can name its line.

The scalars are those of YAML 1.2's core schema. PyYAML follows 1.1, where `1e-5` is a text, `no` is false, `012` is
ten and `2024-01-01` is a date; each of them would turn a sound recipe into another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuna_peft.errors import UserError

KeyPath = tuple[str | int, ...]

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "merge")
)
_FLOAT_PATTERN = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 core scalars; see the module's docstring."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(str(self.construct_scalar(node)))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


# The order counts: the first pattern that matches wins, and every integer also looks like a float.
RecipeLoader.add_implicit_resolver(_NULL, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+0123456789."))
RecipeLoader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])
RecipeLoader.add_constructor(_INT, RecipeLoader.construct_int)
RecipeLoader.add_constructor(_FLOAT, RecipeLoader.construct_float)


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
        places: `file:line`, or the override, for every path of keys that was written.
        folders: Where the files lie that it was read from: the recipe's own, then those of what it extends.
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
    """Reads one recipe file; what it extends is for `layers.read_recipe` to add.

    Raises:
        UserError: It cannot be read, is not UTF-8, is no YAML, repeats a key, or does not hold a mapping.
    """
    path = Path(file)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the recipe: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=str(path), fix="Save it as UTF-8.") from error
    document = parse_document(text, str(path))
    document.folders = [path.parent]
    return document


def parse_document(text: str, file: str) -> Document:
    """As `read_document`, for text that is already in memory; `file` is the name used in errors."""
    loader: RecipeLoader | None = None
    try:
        loader = RecipeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError("the recipe is empty", where=file, fix="Start from one: `tuna-peft recipes list`.")
        document = Document(None)
        document.data = _plain(loader, node, (), file, document.places, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"not valid YAML: {reason}", where=where, fix="Check indentation (no tabs), colons and quotes."
        ) from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(document.data, dict):
        raise UserError("a recipe is a mapping of keys, such as `name: my-run`", where=file)
    return document


def parse_value(text: str) -> Any:
    """One value in YAML, as an override gives it: `1e-5`, `[q_proj, v_proj]`, `{r: 8}`, `null`."""
    return parse_document(f"value: {text}", "value").data["value"]


def _plain(
    loader: RecipeLoader, node: yaml.Node, path: KeyPath, file: str, places: dict[KeyPath, str], above: tuple[int, ...]
) -> Any:
    """Turns a YAML node into plain data and notes the line of every key; `above` guards against recursive aliases."""
    places.setdefault(path, _where(file, node))
    if id(node) in above:
        raise UserError("an alias contains itself", where=places[path], fix="Write the value out.")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, i), file, places, above) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    data: dict[str, Any] = {}
    for merged in _merged_mappings(node, file):
        data.update(_plain(loader, merged, path, file, places, above))
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"the key {key!r} is not text", where=_where(file, key_node), fix="Put it in quotes.")
        if key in lines:
            raise UserError(
                f"the key `{key}` is given twice, first in line {lines[key]}",
                where=_where(file, key_node),
                fix="Remove one of them.",
            )
        lines[key] = key_node.start_mark.line + 1
        places[path + (key,)] = _where(file, key_node)
        data[key] = _plain(loader, value_node, (*path, key), file, places, above)
    return data


def _merged_mappings(node: yaml.MappingNode, file: str) -> list[yaml.MappingNode]:
    """The mappings of `<<: *defaults` or `<<: [*a, *b]`, the weakest first."""
    found: list[yaml.MappingNode] = []
    for key_node, value in node.value:
        if key_node.tag == _MERGE:
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(part, yaml.MappingNode) for part in parts):
                raise UserError("`<<` merges mappings only", where=_where(file, key_node))
            found += reversed(parts)
    return found


def _where(file: str, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"
