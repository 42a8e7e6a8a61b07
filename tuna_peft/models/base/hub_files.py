"""Downloads single files of models from the Hub, with errors that say what to do: gated, missing, no network.

Used before a base is loaded and by the planner; imports no torch.
"""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tuna_peft.errors import UserError

logger = logging.getLogger("tuna_peft")

CACHE = "the Hub's cache (no network)"


def hub_file(model: str, name: str, revision: str | None = None, *, endpoint: str | None = None) -> tuple[Path, str]:
    """One small file of a model repository, from the Hub or, without a network, from the cache.

    Returns:
        Its local path, and a phrase that says where it came from: `CACHE` when there is no network.

    Raises:
        UserError: The model or revision does not exist, is gated or private; or there is no network and no cached
            file.
    """
    try:
        # The metadata first: `hf_hub_download` silently falls back to the cache, and only after many retries.
        get_hf_file_metadata(hf_hub_url(model, name, revision=revision, endpoint=endpoint), token=get_token())
        return Path(hf_hub_download(model, name, revision=revision, endpoint=endpoint)), "the Hub"
    except GatedRepoError as error:
        raise UserError(
            "the model is gated",
            where=model,
            fix=f"Accept its terms at https://huggingface.co/{model}, then run `hf auth login` here.",
        ) from error
    except RevisionNotFoundError as error:
        what = f"the model has no revision {revision!r}"
        raise UserError(what, where=model, fix="Check `base.revision`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            "there is no such model on the Hub, or it is private",
            where=model,
            fix="Check the name; for a private model run `hf auth login` first. A local path starts with ./ or /.",
        ) from error
    except LocalEntryNotFoundError as error:  # a kind of the next error: there was no network
        return _cached(model, name, revision, error)
    except EntryNotFoundError as error:
        raise UserError(f"the model has no {name}", where=model, fix="Use a model in transformers' format.") from error
    except HFValidationError as error:
        what = "neither a folder here nor a Hub id (`owner/name`)"
        raise UserError(what, where=model, fix="Check the name.") from error
    except Exception as error:  # from the HTTP library, which differs between versions of huggingface_hub
        return _cached(model, name, revision, error)


def files_here(model: str, revision: str | None, *names: str) -> bool:
    """Whether these files of a model are on this machine: dry runs and plans download nothing."""
    if model.startswith("builtin:") or Path(model).exists():
        return True
    try:
        return all(isinstance(try_to_load_from_cache(model, name, revision=revision), str) for name in names)
    except HFValidationError:
        return False


def _cached(model: str, name: str, revision: str | None, error: Exception) -> tuple[Path, str]:
    cached = try_to_load_from_cache(model, name, revision=revision)
    if not isinstance(cached, str):
        raise UserError(
            "the Hub cannot be reached, and the model is not in the cache",
            where=model,
            fix="No folder here has this name, either. Check it, or the network (HF_HUB_OFFLINE, HTTPS_PROXY).",
        ) from error
    logger.warning("%s: the Hub cannot be reached; using the copy in the cache", model)
    return Path(cached), CACHE
