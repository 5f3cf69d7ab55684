"""Sockets that keep a deadline, whatever comes in and however slowly."""

from __future__ import annotations

import io
import socket
import time
from typing import Any


class TimedSocket:
    """A connected socket of which no single wait is longer than `stall` and none goes on after `until`.

    A timeout of the socket alone begins anew with every byte, so that a server could send one now and then for ever,
    in the head of an answer too.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._stall = self._until = 0.0

    def limit(self, stall: float, until: float) -> None:
        """Set both, for the next request."""
        self._stall, self._until = stall, until

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
        count: int | None = self._inner.readinto(buffer)
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()
