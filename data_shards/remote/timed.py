"""Sockets that keep a deadline, whatever comes in and however slowly; and how long a wait for them has been of use."""

from __future__ import annotations

import io
import math
import socket
import ssl
import time
from collections import deque
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

_KNOWN = 64  # requests that are remembered
_ENOUGH = 8  # of them before a request is given up for them
_FEW = 4  # of them before another is sent beside it, which costs little
_SHARE = 0.9  # of them needed no more than what counts: a few slow ones say little of the others
_FIRST = 0.5  # seconds, which count for a server that nothing is known of
_ROOM = 4.0  # times what counts, until a request is given up
_LATE = 1.5  # the same, until another is sent beside it
_LEAST = 0.2  # of the least time until it is given up: either side may be busy
_MORE = 2.0  # times as long after each stall


class Patience:
    """How long to wait for the next byte. A server whose requests all went on within milliseconds has lost one that
    brings nothing for a quarter of a second, and asking again costs less than waiting. Whoever asks again waits longer,
    in the end the longest time: a server that has become slow is learned about, not left.

    Safe to use from several threads.
    """

    def __init__(self, most: float, least: float) -> None:
        """Seconds that are waited at most, and at least: however fast a server is, either side may be busy."""
        self._most, self._least = most, least
        self._waits: deque[float] = deque(maxlen=_KNOWN)

    def note(self, longest: float) -> None:
        """The longest wait, in seconds, of a request that brought all of its bytes."""
        self._waits.append(longest)

    def seconds(self, stalls: int) -> float:
        """For a request after so many for the same bytes that stalled."""
        waits = self._waits.copy()
        usual = _usual(waits) if len(waits) >= _ENOUGH else max([_FIRST, *waits])
        return min(self._most, max(self._least, _ROOM * usual) * _MORE ** min(stalls, 8))

    def unusual(self) -> float:
        """Seconds after which it is worth while to ask a second time; infinite where little is known of the server."""
        waits = self._waits.copy()
        return max(_LEAST * self._least, _LATE * _usual(waits)) if len(waits) >= _FEW else math.inf


def _usual(waits: Collection[float]) -> float:
    return sorted(waits)[int(_SHARE * len(waits))]


class Overtaken(Exception):
    """Another request was answered before this one: `exchange`, a `connections.Exchange`."""

    def __init__(self, exchange: Any) -> None:
        super().__init__()
        self.exchange = exchange


class Late(Protocol):
    """What is done about a wait that has become unusual."""

    def wait(self, first: TimedSocket, buffer: Any, ends: float) -> int:
        """Go on with it: as `TimedSocket.wait`, or raise Overtaken."""


class Limits(NamedTuple):
    """Of one request: seconds that a single wait may take, the time of the clock at which all of it ends, and seconds
    after which a wait is unusual."""

    stall: float
    until: float
    unusual: float = math.inf


class TimedSocket:
    """A connected socket of which no single wait is longer than `stall` and none goes on after `until` (`Limits`); one
    that has become unusual is handed to `late`.

    A timeout of the socket alone begins anew with every byte, so that a server could send one now and then for ever,
    in the head of an answer too.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._limits = Limits(0.0, 0.0)
        self._late: Late | None = None
        self._poked: bytes | None = None  # what `poke` has read: a byte, or the end
        self.longest = 0.0  # wait for bytes since the limits were set, in seconds

    def limit(self, limits: Limits, late: Late | None = None) -> None:
        """Set both, for the next request."""
        self._limits, self._late, self.longest = limits, late, 0.0

    def sendall(self, data: bytes) -> None:
        """As of a socket."""
        self._arm(min(time.monotonic() + self._limits.stall, self._limits.until))
        self._socket.sendall(data)

    def recv_into(self, buffer: Any) -> int:
        """As of a socket, within the limits."""
        began = time.monotonic()
        ends = min(began + self._limits.stall, self._limits.until)
        soon = began + self._limits.unusual
        try:
            if self._late is None or soon >= ends:
                return self.wait(buffer, ends)
            try:
                return self.wait(buffer, soon)
            except TimeoutError:
                return self._late.wait(self, buffer, ends)
        finally:
            self.longest = max(self.longest, time.monotonic() - began)

    def wait(self, buffer: Any, ends: float) -> int:
        """The bytes that come until `ends` by the clock. Raises TimeoutError."""
        if self._poked is not None:
            count = len(self._poked)
            buffer[:count], self._poked = self._poked, None
            return count
        self._arm(ends)
        return self._socket.recv_into(buffer)

    def poke(self) -> bool:
        """Whether something has come, bytes or the end, without a wait."""
        if self._poked is None:
            self._socket.settimeout(0)
            try:
                self._poked = self._socket.recv(1)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except OSError:
                self._poked = b""
        return True

    def fileno(self) -> int:
        """As of a socket."""
        return self._socket.fileno()

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket, which stays open as long as the file."""
        return io.BufferedReader(_TimedFile(self, self._socket.makefile("rb", buffering=0)))

    def close(self) -> None:
        """As of a socket."""
        self._socket.close()

    def _arm(self, ends: float) -> None:
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


class _TimedFile(io.RawIOBase):
    """The bytes of a socket, which `inner`, a file of it, keeps open."""

    def __init__(self, timed: TimedSocket, inner: Any) -> None:
        self._timed = timed
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        return self._timed.recv_into(buffer)

    def close(self) -> None:
        self._inner.close()
        super().close()
