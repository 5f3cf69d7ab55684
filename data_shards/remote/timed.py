"""Sockets that keep a deadline, whatever comes in and however slowly; and how long a wait for them has been of use."""

from __future__ import annotations

import io
import socket
import time
from collections import deque
from typing import Any

_KNOWN = 64  # requests that are remembered
_ENOUGH = 8  # of them before anything follows
_SHARE = 0.9  # of them needed no more than what counts: a few slow ones say little of the others
_FIRST = 0.5  # seconds, which count for a server that nothing is known of
_ROOM = 4.0  # times what counts
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
        waits = sorted(self._waits.copy())
        usual = waits[int(_SHARE * len(waits))] if len(waits) >= _ENOUGH else max([_FIRST, *waits])
        return min(self._most, max(self._least, _ROOM * usual) * _MORE ** min(stalls, 8))


class TimedSocket:
    """A connected socket of which no single wait is longer than `stall` and none goes on after `until`.

    A timeout of the socket alone begins anew with every byte, so that a server could send one now and then for ever,
    in the head of an answer too.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._stall = self._until = 0.0
        self.longest = 0.0  # wait for bytes since the limits were set, in seconds

    def limit(self, stall: float, until: float) -> None:
        """Set both, for the next request."""
        self._stall, self._until, self.longest = stall, until, 0.0

    def arm(self) -> None:
        """Before every wait."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(min(left, self._stall))

    def sendall(self, data: bytes) -> None:
        """As of a socket."""
        self.arm()
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket, which stays open as long as the file."""
        return io.BufferedReader(_TimedFile(self, self._socket.makefile("rb", buffering=0)))

    def close(self) -> None:
        """As of a socket."""
        self._socket.close()


class _TimedFile(io.RawIOBase):
    def __init__(self, timed: TimedSocket, inner: Any) -> None:
        self._timed = timed
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._timed.arm()
        began = time.monotonic()
        count: int | None = self._inner.readinto(buffer)
        self._timed.longest = max(self._timed.longest, time.monotonic() - began)
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()
