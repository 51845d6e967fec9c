"""Tables of metadata and manifests on S3."""

import json

import pyarrow as pa
import pytest

from pipeline.errors import ChangedError
from pipeline.limits import Limits
from pipeline.readers.folder import read_folder_unit
from pipeline.readers.manifest import read_manifest_unit
from pipeline.readers.metadata import MetadataReader
from pipeline.records import Reject, Sample
from pipeline.sources.listing import list_sources
from pipeline.sources.manifest import find_manifests
from pipeline.sources.metadata import TableReader, find_tables
from pipeline.sources.sidecars import SidecarIndex
from pipeline.sources.units import make_units
from pipeline.storage.folder import Folder

COLUMNS = pa.schema([("caption", pa.string())])
READER = TableReader({}, Limits(), "utf-8", None)


def to_jsonl(*rows: dict[str, str]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_metadata_are_joined_and_pinned(bucket: str) -> None:
    folder = Folder(f"{bucket}/photos")
    folder.replace("a/1.jpg", b"1")
    folder.replace("metadata.jsonl", to_jsonl({"file_name": "a/1.jpg", "caption": "one"}))
    found = find_tables(list_sources([folder.url], {}, "nowhere").files, READER)
    (unit,) = make_units(found.files, SidecarIndex({}, [], found.index))
    (sample,) = read_folder_unit(unit, {})
    joined = MetadataReader(unit, {}, COLUMNS, Limits(), "utf-8", None).add_columns(sample)
    assert isinstance(joined, Sample)
    assert joined.columns["caption"] == "one"
    folder.replace("metadata.jsonl", to_jsonl({"file_name": "a/1.jpg", "caption": "two"}))
    with pytest.raises(ChangedError, match=r"photos/metadata\.jsonl has changed since it was planned"):
        MetadataReader(unit, {}, COLUMNS, Limits(), "utf-8", None)


def test_rows_of_a_manifest_are_read(bucket: str) -> None:
    lists, images = Folder(f"{bucket}/lists"), Folder(f"{bucket}/elsewhere")
    images.replace("b.jpg", b"b")
    lists.replace("sub/a.jpg", b"a")
    paths = ("sub/a.jpg", f"{images.url}/b.jpg", "gone.jpg", f"{images.url}/gone.jpg", "../elsewhere/b.jpg")
    lists.replace("list.jsonl", to_jsonl(*({"path": path, "caption": path[-5]} for path in paths)))
    files = list_sources([f"{lists.url}/list.jsonl"], {}, "nowhere").files
    (unit,) = make_units(find_manifests(files, READER, None, "").files)
    items = list(read_manifest_unit(unit, {}, COLUMNS, None, None, Limits()))
    assert [(item.key, item.reason if isinstance(item, Reject) else item.image) for item in items] == [
        ("sub/a", b"a"),
        ("1", b"b"),
        ("gone", "not_found"),
        ("3", "not_found"),
        ("4", "outside_root"),
    ]
