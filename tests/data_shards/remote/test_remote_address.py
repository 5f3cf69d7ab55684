"""Which addresses are taken, and what of them is shown."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import data_shards
from data_shards.remote.address import Address, parse_address, without_secrets
from data_shards.remote.folder import RemoteFolder
from data_shards.remote.source import locate
from data_shards.schema import ShardError


@pytest.mark.parametrize("text", ["shards", "/data/shards", "./pipe:x", "C:/shards", "C:\\shards", "a b"])
def test_a_folder_is_a_path(text: str) -> None:
    assert parse_address(text) == Path(text)


@pytest.mark.parametrize("text", ["file:///data/a%20set", "file://localhost/data/a%20set", "FILE:///data/a%20set"])
def test_a_file_url_is_a_path(text: str) -> None:
    assert parse_address(text) == Path("/data/a set")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://host/a/set/", Address("https", "host", "/a/set", "", "")),
        ("http://host:8000", Address("http", "host:8000", "", "", "")),
        ("HTTPS://me:p%40ss@host/set?sig=s3cret", Address("https", "host", "/set", "sig=s3cret", "me:p@ss")),
        ("s3://bucket/a/set", Address("s3", "bucket", "/a/set", "", "")),
        ("gs://bucket/set", Address("gs", "bucket", "/set", "", "")),
    ],
)
def test_a_url_is_taken_apart(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat /etc/passwd", "pipe://x", "ftp://host/set", "simplecache::s3://bucket/set", "zip://a.zip::http://h/s",
        "s3://bucket/a::file:///etc", "memory://set", "data:text/plain,x", "javascript:1", "http:host/set", "http:///set",
        "https://host/../set", "https://host/%2e%2e/set", "https://host/a b", "https://host/\n", "https://host:port/set",
        "https://host/set#part", "file://other/set", "http://[::1/set", "ssh://host/set", "git+https://host/set",
    ],
)  # fmt: skip
def test_another_url_is_refused_in_one_line_that_names_it(text: str) -> None:
    with pytest.raises(ShardError, match=r"\Adata\.shards: .*: expected ") as caught:
        parse_address(text)
    assert "\n" not in str(caught.value) and text.split(":")[0] in str(caught.value)


def test_nothing_secret_is_shown(tmp_path: Path) -> None:
    place = locate("https://me:hunter2@host/set?sig=s3cret", tmp_path)
    assert isinstance(place, RemoteFolder)
    for text in (
        str(place),
        repr(place),
        repr(place.source.address),
        place.label("manifest.json"),
    ):
        assert "hunter2" not in text and "s3cret" not in text and "https://host/set" in text
    with pytest.raises(ShardError) as caught:
        parse_address("ftp://me:hunter2@host/set?sig=s3cret")
    assert "hunter2" not in str(caught.value) and "s3cret" not in str(caught.value)
    told = without_secrets("GET https://me:hunter2@host/a?sig=s3cret: denied, see //x:hunter2@other/b")
    assert told == "GET https://host/a denied, see //other/b"


def test_a_url_needs_a_cache(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"data\.cache: absent: expected a folder .* data\.shards = https://host/set"):
        locate("https://host/set?sig=s3cret")


def test_what_needs_a_folder_here_says_so(tmp_path: Path) -> None:
    place = locate("https://me:hunter2@host/set", tmp_path)
    assert isinstance(place, RemoteFolder)
    for ask in (lambda: place.root, lambda: place.copy("a.tar", tmp_path / "a.tar")):
        with pytest.raises(ShardError, match=r"\Ahttps://host/set.*: on a server: expected a set in a folder of this"):
            ask()


def test_a_local_set_is_read_without_any_of_this() -> None:
    modules = sorted(Path(data_shards.__file__ or "").parent.glob("*.py"))
    assert len(modules) > 10
    for path in modules:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "data_shards.remote" not in ast.unparse(node), path.name
