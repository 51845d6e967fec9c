"""Files of the Hugging Face hub, through huggingface_hub: its cache, its tokens, its offline mode (HF_HUB_OFFLINE=1).

The library is imported when it is needed first; without it, everything else works.
"""

import re
from pathlib import Path
from typing import Any

from vae.errors import LoadError


class NotCachedError(LoadError):
    """A file is not in the local cache, and the hub cannot be asked whether it has it."""


_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve|raw)/([^/]+)/([^?#]+)")


def is_id(ref: str) -> bool:
    """Whether `ref` could name a repository: `owner/name`."""
    return _ID.fullmatch(ref) is not None


def parse(url: str) -> tuple[str, str, str] | None:
    """Repository, revision and file of a URL on the hub, `.../OWNER/NAME/blob/main/FILE`; None of any other."""
    match = _URL.match(url)
    return None if match is None else (match[1], match[2], match[3])


def fetch(repository: str, name: str, revision: str | None = None) -> Path | None:
    """The local path of one file of a repository, fetched where it is not in the cache; None where it has none.

    Raises NotCachedError, and LoadError where the repository refuses.
    """
    hub, errors = _library()
    try:
        return Path(hub.hf_hub_download(repository, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise NotCachedError(
            f"{repository}: {name} is not in the hub's local cache, and the hub cannot be reached "
            "(or HF_HUB_OFFLINE is set)"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise LoadError(f"{repository} is gated: accept its terms on the hub, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError(f"the hub has no repository {repository} (a private one needs HF_TOKEN)") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise LoadError(f"{repository}: {name} cannot be fetched from the hub: {said}") from error


def _library() -> tuple[Any, Any]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise LoadError("models on the hub need the package huggingface_hub: pip install 'latentmill[hub]'") from error
    return huggingface_hub, errors
