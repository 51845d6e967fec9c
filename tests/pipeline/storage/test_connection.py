"""URLs, paths, and the filesystems behind them."""

from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from latentmill.byte_stream import name_url_in_errors
from pipeline.errors import StorageError
from pipeline.storage.connection import get_filesystem, make_absolute


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_absolute("a/../b") == str(tmp_path / "b")
    assert make_absolute("s3://bucket/x") == "s3://bucket/x"


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match="cannot reach nonsense://x"):
        get_filesystem("nonsense://x", {})


def test_missing_credentials_are_named() -> None:
    with pytest.raises(StorageError) as raised, name_url_in_errors("s3://bucket/x", "list"):
        raise NoCredentialsError
    assert str(raised.value) == (
        "cannot list s3://bucket/x: no credentials (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use storage "
        "options: --storage-option key=env:NAME and secret=env:NAME, or anon=true for a public bucket)"
    )
