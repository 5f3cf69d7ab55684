"""Connections to web servers: one for each request that is under way, and those that are free for the next."""

from __future__ import annotations

import os
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple, cast

from data_shards.remote.timed import Late, Limits, Overtaken, TimedSocket

MAX_IDLE = 16  # connections kept open
Place = tuple[str, str]  # scheme and host with port


class Request(NamedTuple):
    """One GET."""

    place: Place
    target: str
    headers: dict[str, str]


class Exchange(NamedTuple):
    """A request that was sent, and the head of what came back."""

    place: Place
    connection: HTTPConnection
    response: HTTPResponse
    timed: TimedSocket

    def close(self) -> None:
        """Close the connection, whatever is still to come over it."""
        self.response.close()
        self.connection.close()


class Connections:
    """Sends requests. Safe to use from several threads, and after a fork."""

    def __init__(self, context: ssl.SSLContext | None, longest: float) -> None:
        """`longest`: seconds until a connection is there, at most."""
        self._context, self._longest = context, longest
        self._pool = _Pool()

    def exchange(self, request: Request, limits: Limits, late: Late) -> Exchange:
        """Send a request and wait for the head of its answer, or of that which came before it (`late`). Raises OSError
        or HTTPException."""
        kept = self._pool.take(request.place)
        if kept is not None:
            # The server may have closed a connection that was kept; only a new one says anything about the server.
            try:
                return _answered(_sent(kept, request, limits, late), request)
            except TimeoutError:
                raise
            except (OSError, HTTPException):
                pass
        return _answered(_sent(self._connect(request.place, limits.until), request, limits, late), request)

    def send(self, request: Request, limits: Limits) -> HTTPConnection:
        """Send a request, and do not wait for the answer. Raises OSError or HTTPException."""
        kept = self._pool.take(request.place)
        return _sent(kept or self._connect(request.place, limits.until), request, limits)

    def give_back(self, exchange: Exchange) -> None:
        """An exchange that is over. Only a connection from which all was read is free for another request."""
        if exchange.response.isclosed() and exchange.connection.sock is not None:
            self._pool.give(exchange.place, exchange.connection)
        else:
            exchange.close()

    def _connect(self, place: Place, until: float) -> HTTPConnection:
        scheme, host = place
        limit = max(min(self._longest, until - time.monotonic()), 0.001)
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


def timed_of(connection: HTTPConnection) -> TimedSocket:
    """The socket of a connection of `Connections`."""
    return cast(TimedSocket, connection.sock)


def _sent(connection: HTTPConnection, request: Request, limits: Limits, late: Late | None = None) -> HTTPConnection:
    timed_of(connection).limit(limits, late)
    try:
        connection.request("GET", request.target, headers=request.headers)
    except BaseException:
        connection.close()
        raise
    return connection


def _answered(connection: HTTPConnection, request: Request) -> Exchange:
    timed = timed_of(connection)
    try:
        return Exchange(request.place, connection, connection.getresponse(), timed)
    except Overtaken as other:
        connection.close()
        return other.exchange
    except BaseException:
        connection.close()
        raise


class _Pool:
    """Connections that are open and free. A forked process must not write into its parent's, and begins without."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._free: list[tuple[Place, HTTPConnection]] = []

    def take(self, place: Place) -> HTTPConnection | None:
        """A free connection to `place`, the one used last, or None."""
        with self._lock:
            self._check_owner()
            for i in reversed(range(len(self._free))):
                if self._free[i][0] == place:
                    return self._free.pop(i)[1]
        return None

    def give(self, place: Place, connection: HTTPConnection) -> None:
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
