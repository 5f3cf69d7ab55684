"""Servers that are late when a test says so, and a way to them that asks a second time after 0.02 s."""

from __future__ import annotations

import os
import socket
from collections import deque
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

import pytest

from data_shards.remote.address import Address, parse_address
from data_shards.remote.connections import Connections
from data_shards.remote.fetch import Fetcher, FetchOptions, Wanted
from data_shards.remote.race import SAVED, Race
from data_shards.remote.timed import Patience
from data_shards.remote.web import Web
from tools.bench.fault_server import ShardServer

NAME = "train-000000.tar"
ONCE = FetchOptions(attempts=1, stall=20.0, least_stall=20.0)  # a request that fails is not made again
EVENT = 20.0  # seconds that the tests wait for what must come at once


class Known(Patience):
    """A server of which all is known: 0.02 s are unusual, and none is given up before 20 s."""

    def __init__(self) -> None:
        super().__init__(ONCE.stall, ONCE.least_stall)
        self.noted: list[float] = []

    def note(self, longest: float) -> None:
        self.noted.append(longest)

    def seconds(self, stalls: int) -> float:
        return ONCE.stall

    def unusual(self) -> float:
        return 0.02


class Phase:
    """Where a request may be overtaken: a wait of a busy machine elsewhere then changes nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.head, may_ask = True, Race._may_ask
        patch.setattr(Race, "_may_ask", lambda race: (not race.given) == self.head and may_ask(race))


class Case:
    """A server, a way to it, and the connections that it has accepted, in the order of the requests."""

    def __init__(self, server: ShardServer, place: str, options: FetchOptions = ONCE, spare: int = 1) -> None:
        self.server, self.accepted = server, list[socket.socket]()
        accept = server.get_request

        def recorded() -> tuple[socket.socket, Any]:
            connected, address = accept()
            self.accepted.append(socket.socket(fileno=os.dup(connected.fileno())))
            return connected, address

        server.get_request = recorded  # type: ignore[method-assign]
        address = parse_address(place)
        assert isinstance(address, Address)
        self.web, self.data = Web(address, options), (server.root / NAME).read_bytes()
        self.patience = self.web._patience = Known()
        self.web._spare._saved = deque([None] * spare, maxlen=SAVED)
        self.fetcher = Fetcher(self.web, options)

    def read(self, start: int = 0) -> bool:
        """Whether a part of the file is what it should be."""
        wanted = Wanted(NAME, start, len(self.data) - 7, len(self.data))
        return self.fetcher.read(wanted)[0] == self.data[start:-7]

    def read_all(self) -> bool:
        """Whether the file, of a length that is not known before, is what it should be."""
        return self.fetcher.read(Wanted(NAME, 0, None, len(self.data)))[0] == self.data

    def ranges(self) -> list[int]:
        """Where the requests begin."""
        return [int((sent[1] or "bytes=0-").removeprefix("bytes=").partition("-")[0]) for sent in self.server.requests]

    def closed(self, number: int) -> bool:
        """Whether the client has closed the connection of a request, TimeoutError if not."""
        self.accepted[number].settimeout(EVENT)
        with suppress(ConnectionResetError):  # there was more to come
            while self.accepted[number].recv(2**16):  # requests that the server is not at
                pass
        return True


class Opened:
    """All connections that are made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._all: list[tuple[Connections, HTTPConnection]] = []
        connect = Connections._connect

        def recorded(connections: Connections, *arguments: Any) -> HTTPConnection:
            connection = connect(connections, *arguments)
            self._all.append((connections, connection))
            return connection

        patch.setattr(Connections, "_connect", recorded)

    def left_over(self) -> list[HTTPConnection]:
        """Those that were neither closed nor kept for the next request. (One that is forgotten is closed by Python, but
        nobody knows when.)"""
        return [
            connection
            for connections, connection in self._all
            if connection.sock is not None and all(connection is not free for _, free in connections._pool._free)
        ]
