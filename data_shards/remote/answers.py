"""What the head of an answer over http says: the bytes that follow, or why there are none."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse

from data_shards.remote.fetch import Answer, Broken, LastingFault, PassingFault

_PASSING = (408, 409, 412, 416, 423, 425, 429)  # of 4xx; of 5xx all but _LASTING
_LASTING = (501, 505)
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


def answer_of(response: HTTPResponse, start: int, stop: int | None, chunks: Iterator[bytes]) -> Answer:
    """The answer to a request for bytes `start` to `stop` (None: the end), with `chunks` where bytes follow. Raises
    PassingFault or LastingFault for any other."""
    status, headers = response.status, response.headers
    mark = headers.get("ETag") or headers.get("Last-Modified") or ""
    if status == 304:
        return Answer(mark, None, start, iter(()), unchanged=True)
    if status not in (200, 206):
        raise _fault_of(status, headers.get("Retry-After"))
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise LastingFault(f"Content-Encoding {encoding[:40]!r}: expected bytes as they are")
    length = response.length  # of the body, None where the server does not say
    if status == 200:
        if stop is not None and start:
            raise Broken("status 200, the whole file: expected 206, a part (a server with byte ranges)")
        return Answer(mark, length, 0, chunks)
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None or not start <= int(found[1]) <= int(found[2]):
        raise Broken("status 206 without its range: expected Content-Range")
    first, last = int(found[1]), int(found[2])
    if first != start or (length is not None and length != last - first + 1):
        raise Broken(f"bytes {first} to {last + 1}: expected those from {start} on, and as many as it says")
    return Answer(mark, None if found[3] == "*" else int(found[3]), first, chunks)


def _fault_of(status: int, retry_after: str | None) -> PassingFault | LastingFault:
    if status in _PASSING or (status >= 500 and status not in _LASTING):
        return PassingFault(f"status {status}: expected 206 or 200", seconds_of(retry_after))
    return LastingFault(f"status {status}: expected 206 or 200")


def seconds_of(retry_after: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, which is a number or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after[:9])
    with suppress(ValueError, TypeError, OverflowError):
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    return None
