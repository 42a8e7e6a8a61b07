"""What several commands make of their options."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tuna_peft.errors import UserError
from tuna_peft.recipe.expectations import expected

Model = TypeVar("Model", bound=BaseModel)


def from_options(model: type[Model], values: dict[str, Any]) -> Model:
    """A section of a recipe, made of command-line options.

    Raises:
        UserError: The first value that is wrong, and what was expected.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"]) or None
        raise UserError(expected([first], first["input"]), where=where) from error
