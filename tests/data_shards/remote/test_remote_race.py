"""A second request beside one that is late: whichever answers first gives the bytes, and nothing gets worse by it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.late_servers import EVENT, NAME, ONCE, Case, Opened, Phase
from helpers.remote_sets import certificate

from data_shards.remote.fetch import RemoteError
from data_shards.remote.race import SAVED, Race, Spare
from tools.bench.fault_server import ShardServer, serving


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("set") / "set", clips=8)


@pytest.fixture
def server(root: Path) -> Iterator[ShardServer]:
    with serving(root, stall=3600.0) as server:
        yield server


@pytest.fixture(autouse=True)
def phase(monkeypatch: pytest.MonkeyPatch) -> Phase:
    return Phase(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_left_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    opened = Opened(monkeypatch)
    yield
    assert not opened.left_over()


@pytest.fixture
def going_on(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A "stall" goes on with the rest of the body once this is set."""
    event = threading.Event()

    def rest(handler: Any, body: bytes, kind: str) -> None:
        if event.wait(EVENT):
            handler.wfile.write(body)

    monkeypatch.setattr("tools.bench.fault_server._Handler._rest", rest)
    return event


def numbered(kinds: dict[int, str]) -> Callable[[str, int], str | None]:
    return lambda name, number: kinds.get(number)


@pytest.mark.parametrize("start", [0, 1000])
def test_a_silent_request_is_overtaken(server: ShardServer, start: int) -> None:
    case = Case(server, server.url)
    server.fault = numbered({1: "silent"})
    assert case.read(start) and case.ranges() == [start, start] and case.closed(0)
    assert not case.patience.noted, "what was lost says nothing of the usual wait"
    assert case.read(start) and len(case.accepted) == 2, "the connection that won is kept"
    assert len(case.patience.noted) == 1


def test_a_second_request_may_need_longer_than_its_connection(server: ShardServer) -> None:
    case = Case(server, server.url)

    def fault(_: str, number: int) -> str | None:
        if number == 2:
            time.sleep(5 * case.patience.unusual())
        return "silent" if number == 1 else None

    server.fault = fault
    assert case.read() and case.ranges() == [0, 0]


@pytest.mark.parametrize(("start", "version"), [(0, "HTTP/1.1"), (1000, "HTTP/1.1"), (1000, "HTTP/1.0")])
def test_a_stall_in_the_middle_is_overtaken_by_a_request_for_the_rest(
    server: ShardServer, phase: Phase, start: int, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.bench.fault_server._Handler.protocol_version", version)
    case, phase.head = Case(server, server.url), False
    server.fault = numbered({1: "stall"})
    assert case.read(start)
    first, second = case.ranges()
    assert first == start < second <= start + (len(case.data) - 7 - start) // 2
    assert case.closed(0) and not case.patience.noted


def test_the_answer_that_won_may_be_overtaken_too(server: ShardServer, phase: Phase) -> None:
    case, phase.head = Case(server, server.url, spare=3), False
    server.fault = numbered({1: "stall", 2: "stall", 3: "stall"})
    assert case.read() and all(map(case.closed, range(3)))
    assert case.ranges() == sorted(set(case.ranges())) and len(case.ranges()) == 4


def test_a_request_that_is_only_late_is_taken_when_it_comes_first(server: ShardServer) -> None:
    second, over = threading.Event(), threading.Event()

    def fault(name: str, number: int) -> None:
        if number == 1:
            second.wait(EVENT)
        else:
            second.set()
            over.wait(EVENT)

    case = Case(server, server.url)
    server.fault = fault
    assert case.read() and second.is_set()
    assert case.closed(1) and case.ranges() == [0, 0]
    assert len(case.patience.noted) == 1
    over.set()


@pytest.mark.parametrize("kind", ["500", "503", "404", "302", "reset", "whole", "cut_length", "gzip"])
def test_a_second_request_that_fails_leaves_the_first_alone(server: ShardServer, kind: str) -> None:
    """A third one shows that the second was given up; the first is answered only then."""
    third = threading.Event()

    def fault(name: str, number: int) -> str | None:
        if number == 1:
            third.wait(EVENT)
        elif number == 3:
            third.set()
        return {1: None, 2: "redirect" if kind == "302" else kind}.get(number, "silent")

    case = Case(server, server.url, spare=2)
    server.fault = fault
    assert case.read(1000) and third.is_set()
    assert case.ranges() == [1000] * 3 and case.closed(1) and case.closed(2)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("kind", ["changed_mark", "503", "404", "whole", "reset"])
def test_the_rest_is_not_taken_from_another_state_of_the_file(
    server: ShardServer, phase: Phase, going_on: threading.Event, kind: str, ends: bool
) -> None:
    def fault(name: str, number: int) -> str | None:
        if number == 3:
            going_on.set()
        return {1: "stall", 2: kind}.get(number, "silent")

    case, phase.head = Case(server, server.url, spare=2), False
    server.fault = fault
    assert (case.read() if ends else case.read_all()) and going_on.is_set()
    assert 0 < case.ranges()[1] <= case.ranges()[2] <= len(case.data) // 2


def test_the_rest_of_a_file_of_another_length_is_not_taken(
    server: ShardServer, phase: Phase, going_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = ShardServer.content

    def longer(self: ShardServer, path: Path) -> tuple[bytes, str]:
        data, mark = content(self, path)
        return (data + b"x" if len(self.requests) == 2 else data), mark

    monkeypatch.setattr(ShardServer, "content", longer)

    def fault(name: str, number: int) -> str | None:
        if number == 3:
            going_on.set()
        return {1: "stall", 2: None}.get(number, "silent")

    case, phase.head = Case(server, server.url, spare=2), False
    server.fault = fault
    assert case.read() and going_on.is_set()


def test_parts_without_a_mark_are_not_joined(
    server: ShardServer, phase: Phase, going_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.marks = False
    case = Case(server, server.url)
    server.fault = numbered({1: "silent"})
    assert case.read() and case.ranges() == [0, 0], "a head may come from either"
    case.web._spare._saved.append(None)
    wait, phase.head = Race.wait, False

    def late(race: Race, *arguments: Any) -> int:
        going_on.set()  # before a second request could be sent
        return wait(race, *arguments)

    monkeypatch.setattr(Race, "wait", late)
    server.fault = numbered({3: "stall"})
    assert case.read() and going_on.is_set() and case.ranges() == [0, 0, 0]


def test_nothing_is_sent_twice_without_a_spare_request(server: ShardServer, root: Path) -> None:
    for options, spare in ((ONCE, 0), (replace(ONCE, second=0.0), None)):
        with serving(root, lambda name, number: "silent", 3600.0) as silent:
            case = Case(silent, silent.url, options, spare or 0)
            if spare is None:
                case.web._spare = Spare(options.second)
            case.patience.seconds = lambda stalls: 0.2  # type: ignore[method-assign]
            with pytest.raises(RemoteError, match=r"stalled: expected bytes \(given up after 0 s, 1 failures"):
                case.read()
            assert case.ranges() == [0]


def test_a_server_that_is_gone_is_told_of_as_before_and_asked_little_more(server: ShardServer) -> None:
    options = replace(ONCE, attempts=12, first_wait=0.0)
    case = Case(server, server.url, options, SAVED)
    case.patience.seconds = lambda stalls: 0.06  # type: ignore[method-assign]
    server.fault = lambda name, number: "silent"
    with pytest.raises(RemoteError) as caught:
        case.read(5)
    told = f"{server.url}/{NAME}: bytes 5 to {len(case.data) - 7}: stalled: expected bytes (given up after "
    assert str(caught.value).startswith(told) and str(caught.value).endswith(" s, 12 failures one after the other)")
    assert len(server.requests) <= 12 + SAVED + 2, "each ten have earned one"
    assert all(map(case.closed, range(len(case.accepted)))), "no connection is left over"


def test_a_second_request_that_finds_no_connection_leaves_the_first_alone(
    server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, refused, limits = Case(server, server.url), threading.Event(), list[float]()
    connect = case.web._connections._connect

    def once(place: Any, until: float) -> Any:
        if len(case.accepted) == 0:
            return connect(place, until)
        limits.append(until - time.monotonic())
        refused.set()
        raise ConnectionRefusedError

    monkeypatch.setattr(case.web._connections, "_connect", once)

    def fault(name: str, number: int) -> None:
        refused.wait(EVENT)

    server.fault = fault
    assert case.read() and refused.is_set() and case.ranges() == [0]
    assert limits[0] <= 2 * case.patience.unusual(), "meanwhile the first is not looked at"


def test_an_answer_over_tls_is_overtaken_too(
    server: ShardServer, phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages of TLS after the handshake are no answer."""
    server.socket = certificate(tmp_path).wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    case, second, over = Case(server, f"https://{server.host}/set"), threading.Event(), threading.Event()

    def fault(name: str, number: int) -> str | None:
        if number == 1:
            second.wait(EVENT)
        elif number == 2:
            second.set()
            over.wait(EVENT)
        return {3: "silent", 5: "stall"}.get(number)

    server.fault = fault
    assert case.read() and second.is_set() and len(case.patience.noted) == 1
    over.set()
    for head, requests in ((True, 4), (False, 6)):
        phase.head = head
        case.web._spare._saved.append(None)
        assert case.read() and len(server.requests) == requests and len(case.patience.noted) == 1


def test_second_requests_are_a_share_of_the_others() -> None:
    spare = Spare(0.1)
    assert [spare.spend() for _ in range(SAVED + 2)] == [True] * SAVED + [False] * 2
    spent = 0
    for _ in range(1000):
        spare.earn()
        spent += spare.spend()
    assert spent == 100
    for _ in range(1000):
        spare.earn()
    assert [spare.spend() for _ in range(SAVED + 1)] == [True] * SAVED + [False]
    none = Spare(0.0)
    for _ in range(1000):
        none.earn()
    assert not none.spend()


def test_an_answer_that_is_not_read_says_nothing_of_the_usual_wait(server: ShardServer) -> None:
    case = Case(server, server.url)
    with case.web.get(NAME, 0, None, EVENT) as answer:
        assert answer.total == len(case.data)
    assert not case.patience.noted and case.closed(0)
    with case.web.get(NAME, 0, None, EVENT) as answer:
        assert sum(map(len, answer.chunks)) == len(case.data)
    assert len(case.patience.noted) == 1


def test_requests_earn_second_ones(server: ShardServer) -> None:
    case = Case(server, server.url, spare=0)
    for _ in range(25):
        assert case.read()
    assert len(case.web._spare._saved) + (len(server.requests) - 25) == 2
