"""Finds the recipes that come with the package. `recipes list`, `load` and `extends` use this."""

from __future__ import annotations

from pathlib import Path

import tuna_peft
from tuna_peft.data.shards import SUFFIXES, data_suffix
from tuna_peft.errors import UserError, did_you_mean

ACCELERATE = "accelerate"  # the folder of accelerate's configurations, which are not recipes


def recipes_folder() -> Path:
    """`tuna_peft/recipes` in an installed wheel, `recipes` next to the package in a checkout or editable install."""
    package = Path(tuna_peft.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no recipes beside {package}: the installation is broken")


def shipped_recipes() -> dict[str, Path]:
    """The files by name, in alphabetical order; the name of a recipe in a folder is `folder/name`."""
    folder = recipes_folder()
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.glob("**/*.yaml"))
        if file.parent.name != ACCELERATE
    }


def find_accelerate_config(config: str | Path) -> Path:
    """A configuration for `accelerate launch`: a file, or the name of one that comes with the package.

    Raises:
        UserError: There is no such file or name.
    """
    path = Path(config).expanduser()
    known = {file.stem: file for file in sorted((recipes_folder() / ACCELERATE).glob("*.yaml"))}
    if path.is_file():
        return path
    if str(config) in known:
        return known[str(config)]
    raise UserError(
        "there is no such accelerate configuration", where=str(config),
        fix=f"Shipped ones: {', '.join(known)}. To make another: `accelerate config --config_file FILE`.",
    )  # fmt: skip


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe; UserError with the most similar name if there is none."""
    known = shipped_recipes()
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise UserError(f"no recipe called {name!r} comes with the package", fix=did_you_mean(stem, known))
    return known[stem]


def summary(file: Path) -> str:
    """The first line of a recipe's opening comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ").strip() if lines and lines[0].startswith("#") else ""


def find_recipe(recipe: str | Path) -> Path:
    """The recipe with this path or, if there is no such file, the shipped recipe with this name.

    Raises:
        UserError: There is no such file or name.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        if path.suffix != ".json" and data_suffix(path) in SUFFIXES:
            fix = f"A recipe names it under `data`; to write one: `tuna-peft init new.yaml --data {recipe}`."
            raise UserError("this is data, not a recipe", where=str(recipe), fix=fix)
        return path
    name = str(recipe)
    if name in shipped_recipes():
        return shipped_recipes()[name]
    if (path / "recipe.yaml").is_file():
        fix = f"Give its recipe: {path / 'recipe.yaml'}"
        raise UserError("this is the folder of a run, not a recipe", where=name, fix=fix)
    known = did_you_mean(path.stem, shipped_recipes())
    fix = f"Give a file or the name of a shipped recipe. {known}"
    raise UserError("there is no such recipe file", where=name, fix=fix)
