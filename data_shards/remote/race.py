"""A second request beside one that is late: the first answer is taken, the other given up.

Of a server with many machines one request now and then is lost, or meets a machine that is busy, while the others go on
as always. To wait for it costs many times what it costs to ask again; to give it up for that would throw away answers
that are only late. So both are waited for (Dean and Barroso, "The Tail at Scale", 2013: hedged requests). A second
request can only help: where its answer is not the wanted one, the first is waited for as if there had been no other.

The load stays bounded: there is one second request for every so many others, and what was saved up is little, so that a
server that has become slow as a whole is not asked twice as much. No thread is needed, one waits for both sockets.
"""

from __future__ import annotations

import itertools
import selectors
import time
from collections import deque
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

from data_shards.remote.answers import answer_of
from data_shards.remote.connections import Connections, Exchange, Request, timed_of
from data_shards.remote.fetch import Answer, LastingFault, PassingFault
from data_shards.remote.timed import Limits, Overtaken, TimedSocket

SAVED = 8  # second requests that may follow each other at once
_CONNECT = 2.0  # times the usual wait until the connection of a second request must be there


class Spare:
    """How many second requests may be sent: `share` of the others. Safe for threads, and without a lock, which a fork
    might copy while it is held."""

    def __init__(self, share: float) -> None:
        self._every = round(1 / share) if share > 0 else 0
        self._sent = itertools.count(1)
        self._saved: deque[None] = deque([None] * SAVED if self._every else (), maxlen=SAVED)

    def earn(self) -> None:
        """Another request was sent."""
        if self._every and next(self._sent) % self._every == 0:
            self._saved.append(None)

    def spend(self) -> bool:
        """Whether a second request may be sent; it counts as sent."""
        try:
            self._saved.pop()
        except IndexError:
            return False
        return True


class Race:
    """What is done when the answer to a request for bytes `start` to `stop` is late, in its head or in the middle: see
    `timed.Late`. For one request in one thread; `request` is set before it is sent, `answer` once there is one, and
    `given` counts the bytes that were taken of it."""

    def __init__(self, connections: Connections, spare: Spare, limits: Limits, start: int, stop: int | None) -> None:
        self.limits = limits
        self.request: Request | None = None
        self.answer: Answer | None = None
        self.given = 0
        self.lost = False  # the answer is another request's
        self._connections, self._spare, self._start, self._stop = connections, spare, start, stop

    def wait(self, first: TimedSocket, buffer: Any, ends: float) -> int:
        """Read what `first` brings, `ends` being the time of the clock when it has stalled. Raises Overtaken with the
        answer of another request; TimeoutError."""
        while self._may_ask() and self._spare.spend():
            exchange = self._raced(first, ends)
            if exchange is not None:
                self.lost = True
                exchange.timed.limit(self.limits, self)
                raise Overtaken(exchange)
            with suppress(TimeoutError):
                return first.wait(buffer, min(ends, time.monotonic() + self.limits.unusual))
        return first.wait(buffer, ends)

    def _may_ask(self) -> bool:
        # Parts of a file can be joined only by its mark.
        return self.request is not None and (self.answer is None or bool(self.answer.mark))

    def _raced(self, first: TimedSocket, ends: float) -> Exchange | None:
        """The answer of a second request; None if `first` went on before it, or if it is not what was asked for."""
        soon = min(ends, time.monotonic() + _CONNECT * self.limits.unusual)
        try:
            second = self._connections.send(self._rest(), Limits(self.limits.unusual, soon))
        except (OSError, HTTPException):
            return None
        exchange = None
        try:
            if _first_of(first, timed_of(second), ends) is not first:
                timed_of(second).limit(Limits(self.limits.unusual, ends))
                exchange = self._accepted(second)
            return exchange
        finally:
            if exchange is None:
                second.close()

    def _rest(self) -> Request:
        """What is still to come, as a request."""
        assert self.request is not None
        if not self.given:
            return self.request
        stop = "" if self._stop is None else str(self._stop - 1)
        return self.request._replace(headers={**self.request.headers, "Range": f"bytes={self._next()}-{stop}"})

    def _next(self) -> int:
        """Where in the file the bytes go on. (A server may have begun before `start`.)"""
        return (self._start if self.answer is None else self.answer.start) + self.given

    def _accepted(self, second: HTTPConnection) -> Exchange | None:
        assert self.request is not None
        start, timed = self._next(), timed_of(second)
        try:
            response = second.getresponse()
        except (OSError, HTTPException):
            return None
        try:
            found = answer_of(response, start, self._stop, iter(()))
        except (PassingFault, LastingFault):
            response.close()
            return None
        if self.answer is not None and (found.unchanged or found[:3] != (self.answer.mark, self.answer.total, start)):
            response.close()
            return None
        return Exchange(self.request.place, second, response, timed)


def _first_of(first: TimedSocket, second: TimedSocket, ends: float) -> TimedSocket:
    """The one of two to which something has come, bytes or the end. TimeoutError when it is `ends` by the clock."""
    with selectors.DefaultSelector() as selector:
        for one in (first, second):
            selector.register(one, selectors.EVENT_READ)
        while (left := ends - time.monotonic()) > 0:
            selector.select(left)
            for one in (first, second):
                if one.poke():  # it may be no more than a message of TLS
                    return one
    raise TimeoutError
