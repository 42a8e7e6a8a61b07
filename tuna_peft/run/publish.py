"""The exports of a run that can fail late: what they need is checked first, and publishing comes last."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuna_peft.errors import UserError
from tuna_peft.export.hub import push, require_token
from tuna_peft.export.release import public_base
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.folder import RunDirectory

PUSHED = "pushed.json"

logger = logging.getLogger("tuna_peft")


def require_exports(recipe: Recipe, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks before anything is trained that the exports at the end can be made.

    Raises:
        UserError: A missing package, a base that llama.cpp cannot run, no token, or adapters on a base without a name.
    """
    settings = recipe.export
    if settings.gguf:
        from tuna_peft.export.gguf import require_gguf

        require_gguf()
        from tuna_peft.export.gguf.model import require_exportable

        require_exportable(config, tokenizer)
    if settings.push is not None:
        require_token()
        public_base(settings.push.what, recipe.base.model, settings.push.base_id)


def publish(run: RunDirectory) -> None:
    """Pushes what the recipe says, once.

    Raises:
        UserError: The Hub refuses it or cannot be reached; the run itself is complete.
    """
    settings = run.recipe.export.push
    if settings is None or run.load(PUSHED) is not None:
        return
    try:
        report = push(
            run.path, settings.repo, kind=settings.what, private=settings.private, revision=settings.revision,
            create_pr=settings.pull_request, base_id=settings.base_id, license=settings.license,
            data_license=settings.data_license,
        )  # fmt: skip
    except UserError as error:
        raise UserError(
            f"the run is complete, but was not published: {error.what}", where=error.where, fix=error.fix
        ) from error
    logger.info("published: %s", report.url)
    run.save(PUSHED, dataclasses.asdict(report))
