"""Revisions of repositories on the Hugging Face hub (`hf://datasets/OWNER/NAME@REVISION/...`).

A branch moves. A source is therefore listed and read at the commit that its revision names when a command starts, on
every worker. The commit is part of the URLs in the plan, but not of the identity of a source.
"""

import re
from collections.abc import Mapping
from typing import Any

from latentmill.byte_stream import name_url_in_errors
from pipeline.storage.connection import get_filesystem

PROTOCOL = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PINNED = re.compile(r"(hf://[^@]*)@[0-9a-f]{40}(?=/|$)")


def pin_revision(url: str, options: Mapping[str, Any]) -> str:
    """Return a URL of a repository on the hub with the commit that its revision names. Other URLs are unchanged.

    The revision is a branch, a tag or a commit; default: the main branch.
    Raises StorageError if the hub cannot be reached, or has no such repository or revision.
    """
    if not url.startswith(PROTOCOL) or url.startswith(f"{PROTOCOL}buckets/"):
        return url
    with name_url_in_errors(url, "list"):
        fs, path = get_filesystem(url, options)
        found = fs.resolve_path(path)
        commit = found.revision
        if not _COMMIT.fullmatch(commit):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=fs.endpoint, token=fs.token)
            commit = api.repo_info(found.repo_id, revision=commit, repo_type=found.repo_type).sha
    repository = found.root.partition("@")[0]
    return f"{PROTOCOL}{repository}@{commit}/{found.path_in_repo}".rstrip("/")


def strip_commit(url: str) -> str:
    """Return a URL without the commit that `pin_revision` put into it. Other URLs are unchanged."""
    return _PINNED.sub(r"\1", url)
