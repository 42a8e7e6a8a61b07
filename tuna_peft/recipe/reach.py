"""What a recipe can do beyond this package: code that it runs, and addresses that it sends to. See docs/safety.md.

`tuna-peft run`, `--dry-run`, `evaluate` and `data inspect` print it, because the recipe may come from a stranger.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from tuna_peft.feedback.settings import ServerSettings
from tuna_peft.recipe.evaluation_schema import LMEvalTask
from tuna_peft.recipe.paths import sections
from tuna_peft.recipe.schema import PushSettings, Stage


def foreign_code(settings: BaseModel) -> Iterator[str]:
    """One line for each piece of Python code that does not belong to this package and that the settings run."""
    for path, section in sections(settings):
        place = ".".join(map(str, path))
        for key in ("grader", "function"):
            name = getattr(section, key, None)
            if isinstance(name, str) and not name.startswith("builtin:"):
                yield f"runs Python code: imports the module {name.partition(':')[0]} ({place}.{key})"
        if getattr(section, "trust_remote_code", False):
            yield f"runs Python code that comes with the model {getattr(section, 'model', '')} ({place})"
        if isinstance(section, LMEvalTask) and section.include_path is not None:
            yield f"runs Python code that the task files in {section.include_path} name with `!function` ({place})"


def addresses(settings: BaseModel) -> Iterator[str]:
    """One line for each server that receives data, with the secret that it receives."""
    for path, section in sections(settings):
        place = ".".join(map(str, path))
        if isinstance(section, ServerSettings):
            yield f"sends prompts and the variable {section.api_key_env} to {section.base_url} ({place})"
        elif isinstance(section, PushSettings):
            yield f"uploads results to {section.repo} on the Hub, with your login there ({place})"
        elif isinstance(section, Stage) and (trackers := section.train.get("report_to")) not in (None, "none", []):
            yield f"sends training metrics and samples to {trackers}, with your login there ({place}.train.report_to)"


def unusual_variables(settings: BaseModel) -> list[str]:
    """Environment variables that would be sent and whose names do not say that they hold an API key."""
    servers = [section for _, section in sections(settings) if isinstance(section, ServerSettings)]
    return sorted({server.api_key_env for server in servers if not server.api_key_env.endswith("_API_KEY")})
