"""Publishes on the Hugging Face Hub in one commit. `run.publish` and the command `push` call it.

The Hub stores files and chunks by their content, so the same call after an interruption does not send them again.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from tuna_peft.errors import UserError
from tuna_peft.export.base_card import base_card
from tuna_peft.export.card import model_card
from tuna_peft.export.release import Kind, Release, collect_release

logger = logging.getLogger("tuna_peft")


@dataclass(frozen=True)
class PushReport:
    """The result of a push, or of its dry run.

    Attributes:
        repo_id: The repository.
        files: Sizes in bytes by path in the repository.
        url: Address of the commit or pull request; None after a dry run.
        commit: Hash of the commit; None after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    commit: str | None = None


def push(
    source: str | Path,
    repo_id: str,
    *,
    kind: Kind | None = None,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    base_id: str | None = None,
    license: str | None = None,
    data_license: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Uploads a run's adapters, merged model or GGUF files, with a model card, as one commit.

    The token is `HF_TOKEN` or that of `hf auth login`. It is never printed.

    Args:
        source: See `collect_release`.
        repo_id: `NAME` or `ORGANISATION/NAME`; created if it does not exist.
        kind: What to publish of a run: `adapters` (default), `merged` or `gguf`.
        private: Whether a new repository is private. If this is True, an existing public one is rejected.
        revision: A branch, created if it does not exist; None is the main branch.
        create_pr: Open a pull request instead of committing.
        base_id: The base's Hub id, if the stack was trained on a local copy.
        license, data_license: Licenses on the card; by default the base's, and none.
        message: Commit message.
        dry_run: Send nothing; no token is needed.

    Raises:
        UserError: Nothing to publish, no token, no permission, or a broken connection.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} cannot name a repository", fix=str(error).splitlines()[0]) from error
    if create_pr and revision not in (None, "main"):
        raise UserError("a pull request goes to the main branch", fix="Leave out the revision, or the pull request.")
    with tempfile.TemporaryDirectory(prefix="tuna-push-") as workdir:
        release = collect_release(source, Path(workdir), kind=kind, base_id=base_id)
        card = model_card(release, repo_id, license=license or _license_of(release), data_license=data_license)
        ModelCard(card)  # parses the metadata: a mistake in it shows here, not after the upload
        release.files["README.md"] = card.encode()
        files = {path: release.size(path) for path in sorted(release.files)}
        if dry_run:
            return PushReport(repo_id, files)
        require_token()
        with _hub_errors(repo_id):
            api = HfApi()
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.repo_info(repo_id).private:
                raise UserError(
                    "the repository exists and is public",
                    where=repo_id,
                    fix="Push it there with --public, or make the repository private first.",
                )
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            operations = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in sorted(release.files.items())
            ]
            logger.info("uploading %d files, %.1f MB, to %s", len(files), sum(files.values()) / 1e6, repo_id)
            info: Any = api.create_commit(
                repo_id,
                operations,
                commit_message=message or f"{release.kind} by tuna_peft",
                revision=revision,
                create_pr=create_pr,
            )
    return PushReport(repo_id, files, info.pr_url or info.commit_url, info.oid)


def require_token() -> None:
    """Checks that the Hub can be used. A run calls it before it trains.

    Raises:
        UserError: There is no token, or the Hub is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("the Hub is switched off (HF_HUB_OFFLINE)", fix="Unset it to push.")
    if get_token() is None:
        raise UserError("no token for the Hub", fix="Run `hf auth login`, or set HF_TOKEN.")


def _license_of(release: Release) -> str | None:
    """The base's license from its model card, if that is on this disk; asking the Hub would need a network."""
    found = None if release.base is None else base_card(release.base, release.revision).get("license")
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turns the Hub's errors into messages that say what to do."""
    again = "Run the same command again: what was uploaded is not sent again."
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        status = _status_of(error)
        if status in (401, 403):
            what = "the Hub does not accept the token" if status == 401 else "the token may not write there"
            fix = "Make one with write permission at https://huggingface.co/settings/tokens and run `hf auth login`."
        elif status == 404:
            what, fix = (
                "no such repository, or the token may not see it",
                "Check its name and the token's permissions.",
            )
        elif status in (409, 412):
            what, fix = "somebody else changed the repository during the upload", again
        elif status is not None and status >= 500:
            what, fix = f"the Hub has a server error (HTTP {status})", again
        elif status is not None:
            what, fix = (
                f"the Hub rejects the request: {_first_line(error)}",
                "Correct what it names and run the command again.",
            )
        elif _is_connection(error):
            what, fix = f"the connection to the Hub broke: {_first_line(error)}", again
        else:
            raise
        raise UserError(what, where=repo_id, fix=fix) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status_of(error: Exception) -> int | None:
    return next((part.response.status_code for part in _chain(error) if isinstance(part, HfHubHTTPError)), None)


def _is_connection(error: Exception) -> bool:
    # httpx may be vendored under another name, depending on the version of huggingface_hub.
    return any(
        isinstance(part, OSError) or type(part).__module__.partition(".")[0].startswith(("httpx", "httpcore"))
        for part in _chain(error)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
