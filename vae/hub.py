"""Download files from the Hugging Face hub with huggingface_hub: its cache, its tokens, its HF_HUB_OFFLINE=1.

The library is optional and imported on first use.
"""

import re
from pathlib import Path
from typing import Any

from latentmill.error_text import first_line
from vae.errors import LoadError


class NotCachedError(LoadError):
    """A file is not in the local cache, and the hub cannot be reached to look for it."""


_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve|raw)/([^/]+)/([^?#]+)")


def is_repository_id(ref: str) -> bool:
    """Return whether `ref` could be a repository's id, `owner/name`."""
    return _REPOSITORY_ID.fullmatch(ref) is not None


def parse_url(url: str) -> tuple[str, str, str] | None:
    """Return repository, revision and file of a hub URL (`.../OWNER/NAME/blob/main/FILE`), or None for another URL."""
    match = _URL.match(url)
    return None if match is None else (match[1], match[2], match[3])


def fetch(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Return the local path of a repository's file, or None if the repository has no such file.

    The file is downloaded if it is not in the local cache. revision: branch, tag or commit; default: the main branch.
    Raises NotCachedError if the file is not cached and the hub cannot be reached. Raises LoadError if huggingface_hub
    is not installed, or the repository does not exist or denies access.
    """
    hub, errors = _import_library()
    try:
        return Path(hub.hf_hub_download(repository, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise NotCachedError(
            f"{repository}: {name} is not in the hub's local cache, and the hub cannot be reached; "
            "check the connection, or unset HF_HUB_OFFLINE if it is set"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise LoadError(f"{repository} is gated; accept its terms on the hub, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError(
            f"the hub has no repository {repository}; check its name (a private one needs HF_TOKEN)"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise LoadError(f"{repository}: {name} cannot be downloaded from the hub: {first_line(error)}") from error


def _import_library() -> tuple[Any, Any]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise LoadError(
            "models on the hub need the package huggingface_hub: run `pip install huggingface_hub` (the extra hub)"
        ) from error
    return huggingface_hub, errors
