"""One request over http or https, or a second beside it, bounded in time and memory whatever the server does.

This is the standard library's client and not fsspec's, which follows redirects to any place, unpacks what is sent
packed without a bound, waits for a server that sends a byte now and then, does not tell whether two parts are of one
state of the file, and needs aiohttp. Proxies are not used.
"""

from __future__ import annotations

import base64
import netrc
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from urllib.parse import urljoin, urlsplit

from data_shards.remote.address import WEB, Address, without_secrets
from data_shards.remote.answers import answer_of
from data_shards.remote.connections import Connections, Exchange, Request
from data_shards.remote.fetch import Answer, Broken, FetchOptions, LastingFault, PassingFault, Stalled
from data_shards.remote.race import Race, Spare
from data_shards.remote.timed import Limits, Overtaken, Patience

CHUNK = 2**20
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


class Web:
    """The files of one folder on a web server. Safe to use from several threads, and after a fork."""

    def __init__(self, address: Address, options: FetchOptions) -> None:
        self._address = address
        self._user = address.user or _user_of_netrc(address.host)
        context = ssl.create_default_context() if address.scheme == "https" else None
        self._connections = Connections(context, options.stall)
        self._patience = Patience(options.stall, options.least_stall)
        self._spare = Spare(options.second)

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
        limits = Limits(self._patience.seconds(stalls), time.monotonic() + seconds, self._patience.unusual())
        race = Race(self._connections, self._spare, limits, start, stop)
        headers = {"Accept-Encoding": "identity", "User-Agent": "dualforce"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-" + ("" if stop is None else str(stop - 1))
        if known.startswith(('"', "W/")):
            headers["If-None-Match"] = known
        query = f"?{self._address.query}" if self._address.query else ""
        url = f"{self._address.scheme}://{self._address.host}{self._address.path}/{name}{query}"
        try:
            body = _Body(self._follow(url, headers, race), race)
            try:
                race.answer = answer_of(body.exchange.response, start, stop, body.chunks())
                yield race.answer
                if body.exchange.response.isclosed() and not race.lost:
                    self._patience.note(body.exchange.timed.longest)
            finally:
                self._connections.give_back(body.exchange)
        except TimeoutError:
            slow = time.monotonic() >= limits.until
            reason = f"too slow: expected the bytes in {seconds:.1f} s" if slow else "stalled: expected bytes"
            raise Stalled(reason) from None
        except ssl.SSLCertVerificationError as error:
            raise LastingFault(f"certificate: {error.verify_message}: expected one that can be verified") from None
        except OSError as error:  # its text may hold more than its reason
            kind = Broken if isinstance(error, ConnectionResetError | BrokenPipeError) else PassingFault
            raise kind(f"connection: {error.strerror or type(error).__name__}: expected an answer") from None
        except HTTPException as error:
            raise Broken(f"{type(error).__name__}: expected an answer of HTTP") from None

    def _follow(self, url: str, headers: dict[str, str], race: Race) -> Exchange:
        first = urlsplit(url)
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            own = (parts.scheme, parts.netloc) == (first.scheme, first.netloc)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            sent = {**headers, **(self._authorization() if own else {})}
            race.request = Request((parts.scheme, parts.netloc), target, sent)
            self._spare.earn()
            exchange = self._connections.exchange(race.request, race.limits, race)
            if exchange.response.status not in _REDIRECTS:
                return exchange
            location = exchange.response.headers.get("Location")
            exchange.connection.close()
            url = _redirected(url, location)
        raise LastingFault(f"more than {MAX_REDIRECTS} redirects: expected a file")

    def _authorization(self) -> dict[str, str]:
        if not self._user:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(self._user.encode()).decode()}


class _Body:
    """The bytes after the head of an answer, from the one request or the other. `exchange`: the one they are of now."""

    def __init__(self, exchange: Exchange, race: Race) -> None:
        self.exchange = exchange
        self._race = race

    def chunks(self) -> Iterator[bytes]:
        while chunk := self._read():
            self._race.given += len(chunk)
            yield chunk
            if self.exchange.response.length == 0:
                self.exchange.response.close()

    def _read(self) -> bytes:
        while True:
            try:
                return self.exchange.response.read1(CHUNK)
            except Overtaken as other:
                self.exchange.close()
                self.exchange = other.exchange


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
