"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import tuna_peft
from tuna_peft.errors import UserError, did_you_mean

ACCELERATE = "accelerate"  # the folder of configurations that are no recipes


def recipes_folder() -> Path:
    """`tuna_peft/recipes` in an installed wheel, `recipes` beside the package in a checkout or editable install."""
    package = Path(tuna_peft.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no recipes beside {package}: the installation is broken")


def shipped_recipes() -> dict[str, Path]:
    """Name to file, in alphabetical order; those in a folder go by `folder/name`."""
    folder = recipes_folder()
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.glob("**/*.yaml"))
        if file.parent.name != ACCELERATE
    }


def find_accelerate_config(config: str | Path) -> Path:
    """A configuration for `accelerate launch`: a file, or the name of one of those that come with the package.

    Raises:
        UserError: There is neither.
    """
    path = Path(config).expanduser()
    known = {file.stem: file for file in sorted((recipes_folder() / ACCELERATE).glob("*.yaml"))}
    if path.is_file():
        return path
    if str(config) in known:
        return known[str(config)]
    raise UserError(
        "there is no such accelerate configuration", where=str(config),
        fix=f"Shipped ones go by name: {', '.join(known)}; `accelerate config --config_file FILE` makes others.",
    )  # fmt: skip


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe; UserError with the nearest name when there is none."""
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
    """A recipe given as a file or as the name of a shipped one; a file of that name wins.

    Raises:
        UserError: There is neither.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    name = str(recipe)
    if name in shipped_recipes():
        return shipped_recipes()[name]
    known = did_you_mean(path.stem, shipped_recipes())
    raise UserError("there is no such recipe file", where=name, fix=f"Shipped recipes go by name. {known}")
