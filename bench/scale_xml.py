"""The CPU time that botocore takes for an answer of S3, which `bench.scale` leaves out."""

import time

from botocore.parsers import ResponseParserFactory
from botocore.session import get_session

from pipeline.storage.connection import parse_time

ENTRY = (
    "<Contents><Key>cache/_commits/{0:08d}-0123456789abcdef.json</Key><LastModified>2026-01-01T00:00:00.000Z"
    "</LastModified><ETag>&quot;{0:032x}&quot;</ETag><Size>2142</Size><StorageClass>STANDARD</StorageClass></Contents>"
)
ROUNDS = 5


def measure_list_answer() -> float:
    """Return the CPU seconds in which botocore parses an answer of LIST with 1,000 names."""
    entries = "".join(ENTRY.format(number) for number in range(1000))
    body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{entries}</ListBucketResult>'.encode()
    shape = get_session().get_service_model("s3").operation_model("ListObjectsV2").output_shape
    factory = ResponseParserFactory()
    factory.set_parser_defaults(timestamp_parser=parse_time)
    parser = factory.create_parser("rest-xml")
    started = time.process_time()
    for _ in range(ROUNDS):
        answer = parser.parse({"body": body, "headers": {}, "status_code": 200}, shape)
        assert len(answer["Contents"]) == 1000
    return (time.process_time() - started) / ROUNDS
