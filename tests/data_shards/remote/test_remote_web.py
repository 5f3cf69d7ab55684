"""Redirects, credentials, connections: what the way to a web server may and may not do."""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import QUICK, certificate, open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.answers import seconds_of
from data_shards.remote.fetch import FetchOptions, RemoteError
from data_shards.remote.source import locate
from data_shards.remote.web import _redirected
from data_shards.schema import ShardError
from tools.bench.fault_server import ShardServer, random_faults, serving

SECRETS = ("hunter2", "s3cret", base64.b64encode(b"me:hunter2").decode())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("set") / "set", clips=8)


def secret_url(server: ShardServer) -> str:
    return f"http://me:hunter2@{server.host}/set?sig=s3cret"


def test_user_and_query_reach_the_server_and_no_message(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        options = replace(QUICK, attempts=3, content_attempts=2)
        opened = ShardSet.open(locate(secret_url(server), tmp_path, options=options))
        reader = opened.split("train")
        reader.read(0)
        assert {request[2] for request in server.requests} == {f"Basic {SECRETS[2]}"}
        assert all(target.endswith("?sig=s3cret") for target in server.targets)
        messages = []
        for kind in ("404", "500", "reset", "changed", "stall"):
            server.fault = lambda name, number, kind=kind: kind  # type: ignore[misc]
            with pytest.raises(ShardError) as caught:
                reader.read(1)
            messages.append(str(caught.value))
    assert not [m for m in messages for secret in SECRETS if secret in m], messages
    assert all(m.startswith(f"http://{server.host}/set/train-000000.tar: ") for m in messages)


def test_a_redirect_is_followed_without_the_credentials_of_the_other_host(root: Path, tmp_path: Path) -> None:
    with serving(root) as other, serving(root) as server:
        server.fault = lambda name, number: "redirect" if name.endswith(".tar") else None
        server.redirect = f"{other.url}/NAME?token=theirs"
        reader = ShardSet.open(locate(secret_url(server), tmp_path, options=QUICK)).split("train")
        assert same(reader.read(0), ShardSet.open(root).split("train").read(0))
        assert [request[2] for request in other.requests] == [None]
        assert other.targets[0].endswith("?token=theirs") and "s3cret" not in other.targets[0]


def test_a_redirect_within_the_host_keeps_the_credentials(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        server.redirect = "/moved/NAME"
        reader = ShardSet.open(locate(secret_url(server), tmp_path, options=QUICK)).split("train")
        asked = len(server.requests)
        server.fault = lambda name, number: "redirect" if number == asked + 1 else None
        reader.read(0)
        assert server.targets[-1].startswith("/moved/train") and server.requests[-1][2] == f"Basic {SECRETS[2]}"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("file:///etc/passwd", "a redirect to 'file:///etc/passwd': expected a URL of http or https"),
        ("ftp://host/x", "a redirect to 'ftp://host/x'"),
        ("pipe:cat /etc/passwd", "a redirect to 'pipe:cat /etc/passwd'"),
        ("gopher://host:70/_x?sig=s3cret", "a redirect to 'gopher://host:70/_x'"),
        ("http://me:hunter2@host/x", "a redirect to 'http://host/x': .* without a user"),
        ("", "a redirect without Location"),
        ("http://host:port/x", "a redirect to what is no URL"),
        ("/set/NAME", "more than 5 redirects"),
    ],
)
def test_a_redirect_elsewhere_is_refused_at_once(root: Path, tmp_path: Path, target: str, told: str) -> None:
    with serving(root) as server:
        reader = open_remote(server, tmp_path, FetchOptions()).split("train")
        server.redirect, server.fault = target, lambda name, number: "redirect"
        began = time.monotonic()
        with pytest.raises(RemoteError, match=told) as caught:
            reader.read(0)
        assert time.monotonic() - began < 2
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_https_does_not_become_http() -> None:
    assert _redirected("https://a/x", "/y") == "https://a/y"
    assert _redirected("http://a/x", "https://b/y") == "https://b/y"
    with pytest.raises(Exception, match="expected https, as before it"):
        _redirected("https://a/x", "http://a/y")


def test_credentials_come_from_netrc(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(root) as server:
        open_remote(server, tmp_path / "cache")
        assert {request[2] for request in server.requests} == {f"Basic {SECRETS[2]}"}


def test_retry_after_is_a_number_or_a_date() -> None:
    assert seconds_of("7") == 7 and seconds_of(None) is None and seconds_of("soon") is None
    assert seconds_of("9" * 5000) is not None
    date = seconds_of(formatdate(time.time() + 100, usegmt=True))
    assert date is not None and 98 < date < 101
    assert seconds_of(formatdate(time.time() - 100, usegmt=True)) == 0


def test_connections_are_kept_and_one_that_the_server_closed_is_no_fault(root: Path, tmp_path: Path) -> None:
    accepted = []
    with serving(root) as server:
        accept = server.get_request
        server.get_request = lambda: accepted.append(accept()) or accepted[-1]  # type: ignore[func-returns-value,method-assign]
        reader = open_remote(server, tmp_path, FetchOptions(attempts=1, second=0.0)).split("train")
        before = len(accepted)
        for i in range(4):
            reader.read(i)
        assert len(accepted) == before, "the connections of opening are used again"
        for connected, _ in accepted:
            connected.shutdown(socket.SHUT_RDWR)
        reader.read(4)
        assert len(accepted) > before


@pytest.mark.parametrize(("version", "kind"), [("HTTP/1.0", None), ("HTTP/1.1", "chunked")])
def test_other_forms_of_an_answer(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, kind: str | None
) -> None:
    monkeypatch.setattr("tools.bench.fault_server._Handler.protocol_version", version)
    local = ShardSet.open(root).split("train")
    with serving(root, lambda name, number: kind) as server:
        reader = open_remote(server, tmp_path, FetchOptions(attempts=1, second=0.0)).split("train")
        assert all(same(reader.read(i), local.read(i)) for i in range(len(local)))


def test_https_with_a_certificate_that_is_known_and_one_that_is_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = certificate(tmp_path)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        place = f"https://{server.host}/set"
        with pytest.raises(RemoteError, match=r"certificate: .*: expected one that can be verified"):
            ShardSet.open(locate(place, tmp_path / "cache", options=FetchOptions()))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
        reader = ShardSet.open(locate(place, tmp_path / "cache", options=QUICK)).split("train")
        server.fault = random_faults(0.3, 2, ("stall", "short", "reset", "500"))
        assert all(same(reader.read(i), local.read(i)) for i in range(len(local)))
        server.fault = lambda name, number: "redirect"
        server.redirect = f"http://{server.host}/set/NAME"
        with pytest.raises(RemoteError, match="expected https, as before it"):
            reader.read(0, 3)


def test_threads_and_a_forked_process_read_at_the_same_time(root: Path, tmp_path: Path) -> None:
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        reader = open_remote(server, tmp_path, most=1).split("train")
        reader.read(0)
        wrong: list[int] = []

        def work(seed: int) -> None:
            for i in range(24):
                at = (i * 5 + seed) % len(local)
                if not same(reader.read(at), local.read(at)):
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        child = os.fork()
        if not child:  # it has the connections of its parent, and must not use them
            pool = reader.source.source._transport._connections._pool  # type: ignore[union-attr]
            kept = pool.take(("http", server.host))
            work(0)
            os._exit(len(wrong) if kept is None else 99)
        work(1)
        assert os.waitpid(child, 0)[1] == 0 and not wrong


def test_a_host_that_is_not_there_is_told_of_soon(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/set"
        with pytest.raises(RemoteError, match=r"/set/manifest\.json: connection: Connection refused: expected"):
            ShardSet.open(locate(url, tmp_path, options=QUICK))


def test_a_head_that_does_not_end_is_bounded(tmp_path: Path) -> None:
    """One byte now and then, in the head of the answer: no wait is long, and together they would be."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def drip() -> None:
            while not ended.is_set():
                connected, _ = listener.accept()
                with connected:
                    try:
                        connected.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                        while not ended.wait(0.05):
                            connected.sendall(b"x")
                    except OSError:
                        continue

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        options = FetchOptions(attempts=2, first_wait=0.01, stall=0.2, least_rate=1e9)
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"too slow: expected the bytes in 0\.4 s"):
            ShardSet.open(locate(f"http://127.0.0.1:{listener.getsockname()[1]}/set", tmp_path, options=options))
        assert time.monotonic() - began < 3
        ended.set()


def test_a_manifest_without_end_is_bounded_in_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.remote.source.MAX_JSON_BYTES", 2**21)
    with serving(root, lambda name, number: "endless") as server, pytest.raises(RemoteError, match="more bytes"):
        open_remote(server, tmp_path)
    with serving(root, lambda name, number: "giant") as server, pytest.raises(RemoteError, match="expected at most"):
        open_remote(server, tmp_path)
