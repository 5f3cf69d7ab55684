"""Waits for one socket or for two, without a server."""

from __future__ import annotations

import math
import socket
import struct
import threading
import time

import pytest
from helpers.late_servers import EVENT

from data_shards.remote.connections import Connections, Request
from data_shards.remote.fetch import Answer
from data_shards.remote.race import Race, Spare, _first_of
from data_shards.remote.timed import Limits, TimedSocket


def test_sending_is_limited_too() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        timed = TimedSocket(ours)
        timed.limit(Limits(0.05, math.inf))
        with pytest.raises(TimeoutError):
            timed.sendall(bytes(2**24))  # more than is under way anywhere
        timed.limit(Limits(60.0, time.monotonic()))
        with pytest.raises(TimeoutError):
            timed.sendall(b"x")
        with pytest.raises(TimeoutError):
            timed.recv_into(bytearray(1))


def test_the_longest_wait_of_a_request_counts() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        timed = TimedSocket(ours)
        timed.limit(Limits(60.0, math.inf))
        later = threading.Timer(0.05, theirs.sendall, [b"ab"])
        later.start()
        assert timed.recv_into(bytearray(1)) == 1
        longest = timed.longest
        assert longest > 0 and timed.recv_into(bytearray(1)) == 1 and timed.longest == longest
        timed.limit(Limits(60.0, math.inf))
        assert timed.longest == 0
        later.join()


def test_the_first_is_preferred_where_both_have_come() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    ours = [TimedSocket(pair[0]) for pair in pairs]
    for _, theirs in pairs:
        theirs.sendall(b"x")
    ends = time.monotonic() + EVENT
    assert _first_of(ours[0], ours[1], ends) is ours[0] and _first_of(ours[1], ours[0], ends) is ours[1]
    buffer = bytearray(4)
    assert [one.wait(buffer, ends) for one in ours] == [1, 1] and buffer[:1] == b"x"
    with pytest.raises(TimeoutError):
        _first_of(*ours, time.monotonic())
    for pair in pairs:
        for one in pair:
            one.close()


@pytest.mark.parametrize("rude", [False, True])
def test_the_end_of_a_connection_is_something_that_has_come(rude: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        silent, other = socket.socketpair()
        with ours, silent, other:
            timed, late = TimedSocket(ours), TimedSocket(silent)
            assert not timed.poke() and not late.poke()
            if rude:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            ends = time.monotonic() + EVENT
            assert _first_of(late, timed, ends) is timed and timed.wait(bytearray(1), ends) == 0


def test_the_rest_begins_where_the_answer_is() -> None:
    """A server may send a file from its first byte on, whatever was asked for."""
    race = Race(Connections(None, 1.0), Spare(0.1), Limits(1.0, 1.0), 1000, None)
    race.request = Request(("http", "host"), "/set/manifest.json", {"Range": "bytes=1000-"})
    assert race._rest().headers == {"Range": "bytes=1000-"}
    for start, begins in ((1000, 1010), (0, 10)):
        race.answer, race.given = Answer("mark", 5000, start, iter(())), 10
        assert race._rest().headers == {"Range": f"bytes={begins}-"}
