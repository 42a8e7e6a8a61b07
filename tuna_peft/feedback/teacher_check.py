"""Checks, before anything is sampled, that a teacher's tokenizer can show it the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from tuna_peft.data.bad_row import BadRow
from tuna_peft.data.ranked import Record
from tuna_peft.data.texts import prompt_text
from tuna_peft.errors import UserError
from tuna_peft.feedback.local_model import local_base
from tuna_peft.feedback.settings import ScoreSettings
from tuna_peft.feedback.teacher_server import server_tokenizer, text_prompt
from tuna_peft.models.base.hub_files import files_here
from tuna_peft.models.base.load import load_config_and_tokenizer


def check_teacher(rows: Sequence[Record], settings: ScoreSettings, where: str, *, online: bool) -> None:
    """Checks that the teacher can read the prompts of `rows`, without loading its weights or asking its server.

    Single prompts that its chat template refuses are skipped and counted later; here it must take one.

    Args:
        where: Key of the settings in the recipe.
        online: Otherwise a tokenizer that is not on this machine is not checked.

    Raises:
        UserError: The prompts are messages, and the teacher has no chat template, or one that refuses them all.
    """
    if settings.generate is not None or all(isinstance(row["prompt"], str) for row in rows):
        return
    if settings.server is not None and settings.tokenizer is None:
        for row in rows:
            text_prompt(row)
        return
    name, revision = (settings.tokenizer, None) if settings.tokenizer else local_base(settings)
    if not online and not files_here(name, revision, "config.json", "tokenizer_config.json"):
        return
    if settings.server is not None:
        tokenizer = server_tokenizer(name)
    else:
        trust = settings.trust_remote_code
        tokenizer = load_config_and_tokenizer(name, revision=revision, trust_remote_code=trust)[1]
    if not tokenizer.chat_template:
        raise UserError(
            "the prompts are lists of messages, and the teacher's tokenizer has no chat template",
            where=f"{where} ({name})",
            fix="Take a teacher that is trained for chats, or prompts that are text: `prompt: {template: alpaca}`, or "
            "a template of your own.",
        )
    refused = None
    for row in rows:
        try:
            prompt_text(row["prompt"], tokenizer, f"prompt {row.get('id')} for {where} ({name})", row.get("tools"))
            return
        except BadRow as error:
            refused = refused or error
    if refused is not None:
        raise refused
