"""One request over http or https, bounded in time and memory whatever the server does.

This is the standard library's client and not fsspec's, which follows redirects to any place, unpacks what is sent
packed without a bound, waits for a server that sends a byte now and then, does not tell whether two parts are of one
state of the file, and needs aiohttp. Proxies are not used.
"""

from __future__ import annotations

import base64
import netrc
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

from data_shards.remote.address import WEB, Address, without_secrets
from data_shards.remote.fetch import Answer, FetchOptions, LastingFault, PassingFault, Stalled
from data_shards.remote.timed import Patience, TimedSocket

CHUNK = 2**20
MAX_REDIRECTS = 5
MAX_IDLE = 16  # connections kept open
_PASSING = (408, 409, 412, 416, 423, 425, 429)  # of 4xx; of 5xx all but _LASTING
_LASTING = (501, 505)
_REDIRECTS = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_Place = tuple[str, str]  # scheme and host with port


class Web:
    """The files of one folder on a web server. Safe to use from several threads, and after a fork."""

    def __init__(self, address: Address, options: FetchOptions) -> None:
        self._address = address
        self._options = options
        self._user = address.user or _user_of_netrc(address.host)
        self._context = ssl.create_default_context() if address.scheme == "https" else None
        self._pool = _Pool()
        self._patience = Patience(options.stall, options.least_stall)

    def shown(self, name: str) -> str:
        """URL of a file, without secrets."""
        return self._address.shown(name)

    def forget(self, name: str) -> None:
        """Nothing is remembered."""

    @contextmanager
    def get(
        self, name: str, start: int, stop: int | None, seconds: float, known: str = "", stalls: int = 0
    ) -> Iterator[Answer]:
        """See `fetch.Transport`."""
        limits = _Limits(self._patience.seconds(stalls), time.monotonic() + seconds)
        headers = {"Accept-Encoding": "identity", "User-Agent": "dualforce"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-" + ("" if stop is None else str(stop - 1))
        if known.startswith(('"', "W/")):
            headers["If-None-Match"] = known
        query = f"?{self._address.query}" if self._address.query else ""
        url = f"{self._address.scheme}://{self._address.host}{self._address.path}/{name}{query}"
        try:
            exchange = self._follow(url, headers, limits)
            try:
                yield _answer(exchange, start, stop)
                if exchange.response.isclosed():
                    self._patience.note(exchange.timed.longest)
            finally:
                self._give_back(exchange)
        except TimeoutError:
            slow = time.monotonic() >= limits.until
            reason = f"too slow: expected the bytes in {seconds:.1f} s" if slow else "stalled: expected bytes"
            raise Stalled(reason) from None
        except ssl.SSLCertVerificationError as error:
            raise LastingFault(f"certificate: {error.verify_message}: expected one that can be verified") from None
        except OSError as error:  # its text may hold more than its reason
            raise PassingFault(f"connection: {error.strerror or type(error).__name__}: expected an answer") from None
        except HTTPException as error:
            raise PassingFault(f"{type(error).__name__}: expected an answer of HTTP") from None

    def _follow(self, url: str, headers: dict[str, str], limits: _Limits) -> _Exchange:
        first = urlsplit(url)
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            own = (parts.scheme, parts.netloc) == (first.scheme, first.netloc)
            exchange = self._exchange(parts, {**headers, **(self._authorization() if own else {})}, limits)
            if exchange.response.status not in _REDIRECTS:
                return exchange
            target = exchange.response.headers.get("Location")
            exchange.connection.close()
            url = _redirected(url, target)
        raise LastingFault(f"more than {MAX_REDIRECTS} redirects: expected a file")

    def _authorization(self) -> dict[str, str]:
        if not self._user:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(self._user.encode()).decode()}

    def _exchange(self, parts: SplitResult, headers: dict[str, str], limits: _Limits) -> _Exchange:
        place = (parts.scheme, parts.netloc)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        kept = self._pool.take(place)
        if kept is not None:
            # The server may have closed a connection that was kept; only a new one says anything about the server.
            try:
                return self._send(kept, place, target, headers, limits)
            except TimeoutError:
                raise
            except (OSError, HTTPException):
                pass
        return self._send(self._connect(place, limits.until), place, target, headers, limits)

    def _connect(self, place: _Place, until: float) -> HTTPConnection:
        scheme, host = place
        limit = max(min(self._options.stall, until - time.monotonic()), 0.001)
        connection: HTTPConnection
        if scheme == "https":
            context = self._context or ssl.create_default_context()
            connection = HTTPSConnection(host, timeout=limit, context=context)
        else:
            connection = HTTPConnection(host, timeout=limit)
        connection.auto_open = 0  # one that was closed is not opened behind our back, without limits
        connection.connect()
        connection.sock = TimedSocket(connection.sock)
        return connection

    def _send(
        self, connection: HTTPConnection, place: _Place, target: str, headers: dict[str, str], limits: _Limits
    ) -> _Exchange:
        timed: Any = connection.sock  # a TimedSocket
        timed.limit(*limits)
        try:
            connection.request("GET", target, headers=headers)
            return _Exchange(place, connection, connection.getresponse(), timed)
        except BaseException:
            connection.close()
            raise

    def _give_back(self, exchange: _Exchange) -> None:
        # Only a connection from which all was read is free for another request.
        if exchange.response.isclosed() and exchange.connection.sock is not None:
            self._pool.give(exchange.place, exchange.connection)
        else:
            exchange.response.close()
            exchange.connection.close()


class _Exchange(NamedTuple):
    """A request that was sent, and the head of what came back."""

    place: _Place
    connection: HTTPConnection
    response: HTTPResponse
    timed: TimedSocket


class _Limits(NamedTuple):
    """Of one request: seconds that a single wait may take, and the time of the clock at which all of it ends."""

    stall: float
    until: float


class _Pool:
    """Connections that are open and free. A forked process must not write into its parent's, and begins without."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._free: list[tuple[_Place, HTTPConnection]] = []

    def take(self, place: _Place) -> HTTPConnection | None:
        """A free connection to `place`, the one used last, or None."""
        with self._lock:
            self._check_owner()
            for i in reversed(range(len(self._free))):
                if self._free[i][0] == place:
                    return self._free.pop(i)[1]
        return None

    def give(self, place: _Place, connection: HTTPConnection) -> None:
        """Keep a connection for the next request; the oldest of too many is closed."""
        with self._lock:
            self._check_owner()
            self._free.append((place, connection))
            oldest = self._free.pop(0)[1] if len(self._free) > MAX_IDLE else None
        if oldest is not None:
            oldest.close()

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            self._owner, self._free = os.getpid(), []


def _answer(exchange: _Exchange, start: int, stop: int | None) -> Answer:
    response = exchange.response
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
            raise PassingFault("status 200, the whole file: expected 206, a part (a server with byte ranges)")
        return Answer(mark, length, 0, _chunks(response))
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None or not start <= int(found[1]) <= int(found[2]):
        raise PassingFault("status 206 without its range: expected Content-Range")
    first, last = int(found[1]), int(found[2])
    if first != start or (length is not None and length != last - first + 1):
        raise PassingFault(f"bytes {first} to {last + 1}: expected those from {start} on, and as many as it says")
    return Answer(mark, None if found[3] == "*" else int(found[3]), first, _chunks(response))


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read1(CHUNK):
        yield chunk
        if response.length == 0:
            response.close()


def _fault_of(status: int, retry_after: str | None) -> PassingFault | LastingFault:
    if status in _PASSING or (status >= 500 and status not in _LASTING):
        return PassingFault(f"status {status}: expected 206 or 200", _seconds(retry_after))
    return LastingFault(f"status {status}: expected 206 or 200")


def _seconds(retry_after: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, which is a number or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after[:9])
    with suppress(ValueError, TypeError, OverflowError):
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    return None


def _redirected(url: str, target: str | None) -> str:
    """Where a redirect leads; LastingFault where it must not."""
    if not target:
        raise LastingFault("a redirect without Location: expected one")
    try:
        new = urljoin(url, target)
        parts = urlsplit(new)
        parts.port  # noqa: B018 - parsed when it is asked for
    except ValueError:
        raise LastingFault("a redirect to what is no URL: expected one") from None
    if parts.scheme not in WEB or not parts.hostname or "@" in parts.netloc:
        shown = without_secrets(new)[:200]
        raise LastingFault(f"a redirect to {shown!r}: expected a URL of {' or '.join(WEB)} without a user")
    if urlsplit(url).scheme == "https" and parts.scheme == "http":
        raise LastingFault(f"a redirect to {without_secrets(new)[:200]!r}: expected https, as before it")
    return new


def _user_of_netrc(host: str) -> str:
    """ "NAME:PASSWORD" for `host` in ~/.netrc, or nothing."""
    try:
        found = netrc.netrc().authenticators(host.rsplit(":", 1)[0])
    except (OSError, netrc.NetrcParseError):  # absent, unreadable or not one: of other tools, and no fault of the set
        return ""
    return f"{found[0]}:{found[2]}" if found else ""
