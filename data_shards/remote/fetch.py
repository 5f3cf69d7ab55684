"""Bytes of a file on a server: requests until they are there, or until it is clear that they will not be.

A request may fail in passing (5xx, 429, a timeout, a stall, a short body) or for good (403, 404). After a passing
fault comes the next request, after a wait that grows and is partly random, so that many processes do not return all
at once; only after the first answer that broke off it comes without one. What has arrived is kept, and the rest is
asked for. Bytes of two states of a file are never joined: where the server's mark of the content (ETag or date)
differs, or where there is none, reading begins again. Neither a mark nor a length is proof of anything: `check` and the
checksums of the index are.

Everything is bounded. A request for n bytes takes at most `2 stall + n / least_rate` seconds, all requests for them at
most `patience`, and no more memory than n bytes whatever the server sends.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from data_shards.schema import ShardError

GROWTH = 3.0
AWAY = 8  # failures one after the other that are no accident: the server is away, whatever they are
PROGRESS = 2**18  # bytes; a request that brings as many is not a failure, however it ends


class RemoteError(ShardError):
    """A server that cannot be read, or a set that changed on it. It says nothing about a clip: another rank may have
    read the clip, so that it must end a run and never lead to another clip in its place."""


class ChangedError(RemoteError):
    """The set on the server is another one than the one that was opened."""


class PassingFault(Exception):
    """One request that failed and may succeed later; `after`: the seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Stalled(PassingFault):
    """One request to which nothing more came in time."""


class Broken(PassingFault):
    """One request whose answer broke off, or was not what was asked for. That says nothing of how busy the server is,
    so that the first request after it need not wait."""


class LastingFault(Exception):
    """One request that will not succeed later."""


class Answer(NamedTuple):
    """What a server sends: `chunks` are the bytes of the file from `start` on."""

    mark: str  # the server's name of the content; empty where it gives none
    total: int | None  # bytes of the whole file, where the server says it
    start: int
    chunks: Iterator[bytes]
    unchanged: bool = False  # the content is that of the mark that was asked about: there are no chunks


class Transport(Protocol):
    """One way to a server."""

    def get(
        self, name: str, start: int, stop: int | None, seconds: float, known: str = "", stalls: int = 0
    ) -> AbstractContextManager[Answer]:
        """Ask for bytes `start` to `stop` (None: the end) of a file. All of it, also the chunks, takes at most
        `seconds`; the more `stalls` there were before, the longer a silent server is waited for. With `known` the
        answer may be "unchanged". Raises PassingFault or LastingFault, also in a chunk."""

    def shown(self, name: str) -> str:
        """URL of a file, without secrets."""

    def forget(self, name: str) -> None:
        """Ask the server anew for whatever is remembered of a file."""


@dataclass(frozen=True)
class FetchOptions:
    """When to give up. With these values a server may be away for some minutes; a run goes on when it is back."""

    attempts: int = 16  # requests one after the other that bring less than PROGRESS bytes
    # Seconds, GROWTH times as long for each one that counts (`Failures`): most faults are of one request alone, and a
    # server that is away is soon left in peace.
    first_wait: float = 0.02
    longest_wait: float = 30.0
    stall: float = 10.0  # seconds without a byte, and until the connection is there
    least_stall: float = 0.25  # the same of a server that has usually been fast (over http)
    second: float = 0.1  # of the requests may be sent again beside one that is late (over http; 0: none)
    least_rate: float = 65536.0  # bytes a second that a request must bring at least, beside `stall`
    patience: float = 600.0  # seconds for all requests
    content_attempts: int = 4  # times that bytes are fetched which are not those of the index
    recheck: float = 300.0  # seconds after which the manifest is looked at again

    def pause(self, failures: int) -> float:
        """Seconds before the next request after so many failures that count, half of it random; 0 for none."""
        if failures <= 0:
            return 0.0
        pause = self.first_wait * GROWTH ** min(failures - 1, 50)
        return min(pause, self.longest_wait) * random.uniform(0.5, 1.0)


class Wanted(NamedTuple):
    """Bytes `start` to `stop` of a file of `size` bytes; or all of it (`stop` None), at most `size` bytes."""

    name: str
    start: int
    stop: int | None
    size: int
    what: str = ""  # for messages: the sample and its members, "...:"

    @property
    def most(self) -> int:
        """The number of bytes, or the largest one."""
        return (self.size if self.stop is None else self.stop) - self.start


@dataclass
class _Got:
    """What has arrived, all of it under one mark."""

    mark: str = ""
    data: bytearray = field(default_factory=bytearray)

    def clear(self) -> None:
        self.mark, self.data = "", bytearray()


class Failures:
    """Those one after the other of one read, and how many of them count for the pause before the next request.

    Those that broke off and the others are counted apart, so that accidents of both sorts do not add up, and the first
    that broke off is for nothing. From `AWAY` failures on all count.
    """

    def __init__(self) -> None:
        self.all = self._broken = self._others = 0

    def add(self, broken: bool, progress: bool = False) -> int:
        """Take one over, which brought much all the same with `progress`; how many count, for `FetchOptions.pause`."""
        if progress:
            self.all = self._broken = self._others = 0
        else:
            self.all, self._broken, self._others = self.all + 1, self._broken + broken, self._others + (not broken)
        if self.all >= AWAY:
            return self.all
        return self._broken - 1 if broken else max(self._others, 1)


Check = Callable[[bytes], object]


class Fetcher:
    """Reads through a transport until it has what was asked for. Safe to use from several threads."""

    def __init__(self, transport: Transport, options: FetchOptions) -> None:
        self.transport = transport
        self.options = options

    def read(self, wanted: Wanted, check: Check | None = None) -> tuple[bytes, str]:
        """The bytes, for which `check` raised no ShardError, and the server's mark of them.

        Raises RemoteError that names URL, `wanted.what` and the last fault; or the last ShardError of `check`.
        """
        got, failures, stalls, wrongs, began = _Got(), Failures(), 0, 0, time.monotonic()
        until = began + self.options.patience
        while True:
            wrong: ShardError | None = None
            before, broken = len(got.data), True
            try:
                self._request(wanted, got, until, stalls)
                if check is not None:
                    check(bytes(got.data))
                return bytes(got.data), got.mark
            except LastingFault as fault:
                raise self._failed(wanted, str(fault)) from None
            except ShardError as error:
                reason, after, wrong, wrongs = str(error), None, error, wrongs + 1
                got.clear()
                if wrongs >= self.options.content_attempts:
                    raise
            except PassingFault as fault:
                reason, after, stalls = str(fault), fault.after, stalls + isinstance(fault, Stalled)
                broken = isinstance(fault, Broken)
                self.transport.forget(wanted.name)
                if not got.mark:
                    got.clear()
            pause = self._pause(failures.add(broken, len(got.data) - before >= PROGRESS), after)
            if failures.all >= self.options.attempts or time.monotonic() + pause >= until:
                spent = f"given up after {time.monotonic() - began:.0f} s, {failures.all} failures one after the other"
                raise wrong or self._failed(wanted, f"{reason} ({spent})")
            time.sleep(pause)

    def unchanged(self, name: str, mark: str) -> bool:
        """Whether the server says that a file is still the one of `mark`; one request, and no is no proof."""
        if not mark:
            return False
        try:
            with self.transport.get(name, 0, None, self.options.stall, mark) as answer:
                return answer.unchanged
        except (PassingFault, LastingFault):
            return False

    def _request(self, wanted: Wanted, got: _Got, until: float, stalls: int) -> None:
        rest = wanted.most - len(got.data)
        seconds = min(2 * self.options.stall + rest / self.options.least_rate, until - time.monotonic())
        start = wanted.start + len(got.data)
        with self.transport.get(wanted.name, start, wanted.stop, max(seconds, 0.001), stalls=stalls) as answer:
            if wanted.stop is not None and answer.total is not None and answer.total != wanted.size:
                got.clear()
                raise Broken(f"a file of {answer.total} bytes: expected {wanted.size}, the manifest's")
            if answer.start != start or (got.data and answer.mark != got.mark):
                got.clear()
                if answer.start != wanted.start:
                    raise Broken("content that changed while it was read: expected one state of it")
            got.mark = answer.mark
            self._take(wanted, got, answer)

    def _take(self, wanted: Wanted, got: _Got, answer: Answer) -> None:
        most, enough = wanted.most, wanted.most
        if wanted.stop is None:
            enough = answer.total if answer.total is not None else 0
            if enough > most:
                raise LastingFault(f"{enough} bytes: expected at most {most}")
        for chunk in answer.chunks:
            got.data += chunk
            if len(got.data) > most:
                got.clear()
                raise Broken(f"more bytes than asked for: expected {most}")
        if len(got.data) < enough:
            raise Broken(f"{len(got.data)} bytes: expected {enough} (short body)")

    def _pause(self, count: int, after: float | None) -> float:
        pause = self.options.pause(count)
        return pause if after is None else max(pause, min(after, self.options.longest_wait))

    def _failed(self, wanted: Wanted, reason: str) -> RemoteError:
        what = f" {wanted.what}" if wanted.what else ""
        part = "" if wanted.stop is None else f" bytes {wanted.start} to {wanted.stop}:"
        return RemoteError(f"{self.transport.shown(wanted.name)}:{what}{part} {reason}")
