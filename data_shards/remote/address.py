"""Where a shard set is: a folder, or a URL whose scheme is on a list. Secrets in a URL stay out of every message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from data_shards.schema import ShardError, shown

WEB = ("http", "https")
BUCKETS = ("s3", "gs", "az", "abfs")
SCHEMES = (*WEB, *BUCKETS, "file")

# Two letters at least, because one is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_PLAIN = re.compile(r"[!-~]+")


class Address(NamedTuple):
    """A folder on a server. `path` and `query` are as in the URL (quoted); `user` is "NAME:PASSWORD" or empty."""

    scheme: str
    host: str  # with port; the bucket of an object store
    path: str  # without a slash at its end
    query: str
    user: str

    def __repr__(self) -> str:
        return f"Address({self.shown()!r})"

    def shown(self, name: str = "") -> str:
        """The URL of the file `name` in this folder, or of the folder, without user, password and query."""
        return f"{self.scheme}://{self.host}{self.path}" + (f"/{name}" if name else "")


def parse_address(text: str, schemes: tuple[str, ...] = SCHEMES) -> Path | Address:
    """The folder or URL in `text`; ShardError unless a URL is of one of `schemes` and complete.

    "file" becomes a path: what is checked of local files is checked of these too. fsspec's chains ("zip://a::s3://b")
    are refused, because what a chain does is not seen from its first scheme.
    """
    found = _SCHEME.match(text)
    if not found:
        return Path(text)
    scheme = found[1].lower()
    if scheme not in schemes:
        raise _refused(without_secrets(text), f"a folder, or a URL of {', '.join(schemes)}")
    parts = _split(text)
    if parts is None or "::" in text or parts.fragment or not _PLAIN.fullmatch(text):
        raise _refused(without_secrets(text), f"a plain URL, {scheme}://HOST/FOLDER")
    user, _, host = parts.netloc.rpartition("@")
    if scheme == "file":
        if host not in ("", "localhost"):
            raise _refused(without_secrets(text), "file:///FOLDER, on this machine")
        return Path(unquote(parts.path))
    if not host or ".." in unquote(parts.path).split("/"):
        raise _refused(without_secrets(text), f"{scheme}://HOST/FOLDER, without ..")
    return Address(scheme, host, parts.path.rstrip("/"), parts.query, unquote(user))


def without_secrets(text: str) -> str:
    """`text`, a URL or a message that may hold some, without user, password and query of any of them."""
    return re.sub(r"\?[^\s'\")]*", "", re.sub(r"//[^/\s'\"]*@", "//", text))


def _split(text: str) -> SplitResult | None:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - parsed when it is asked for
    except ValueError:
        return None
    return parts if text[len(parts.scheme) :].startswith("://") else None


def _refused(value: str, expected: str) -> ShardError:
    return ShardError(f"data.shards: {shown(value, raw=True)}: expected {expected}")
