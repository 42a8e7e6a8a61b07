"""The small recipe of `recipe_files` for the tests of this folder."""

from recipe_files import recipe_file, write  # noqa: F401
