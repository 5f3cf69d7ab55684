"""Changes that a hostile author could make to a good shard set, each with sums that agree with it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from helpers.fake_shards import write_fake_shards
from helpers.shard_edits import (
    Columns,
    change_index,
    change_rows,
    locate,
    replace_bytes,
    rewrite_manifest,
    seal,
)

from data_shards.schema import ShardError

TAR, SUMS, INDEX, MANIFEST = "train-000000.tar", "train-000000.sums.safetensors", "index.safetensors", "manifest.json"
Change = Callable[[Path], Any]
Edit = Callable[[dict[str, Any]], Any]


class Bomb:
    """Unpickling makes the file CANARY in the working folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.system, ("touch CANARY",))


def good_set(root: Path) -> Path:
    """The set that the changes start from."""
    return write_fake_shards(root, clips=2, frames=3, height=2, width=2, struct_dim=3, audio_dim=4, validation_clips=1,
                             flame=True, text_dim=3)  # fmt: skip


def manifest(edit: Edit) -> Change:
    def change(root: Path) -> None:
        with suppress(ShardError):  # what cannot be sealed is left as plain JSON
            rewrite_manifest(root, edit)

    return change


def raw_manifest(edit: Callable[[bytes], bytes]) -> Change:
    return lambda root: (root / MANIFEST).write_bytes(edit((root / MANIFEST).read_bytes()))


def index(edit: Callable[[Columns], Any]) -> Change:
    """Change the columns of the index."""
    return lambda root: change_index(root, edit)


def rows(edit: Callable[[Any], Any]) -> Change:
    """Change the checksums of the first tar."""
    return lambda root: change_rows(root, TAR, edit)


def raw(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of the index or the checksums."""

    def change(root: Path) -> None:
        (root / name).write_bytes(edit((root / name).read_bytes()))
        seal(root, name)

    return change


def column_header(name: str, edit: Edit) -> Change:
    """Change the header of the index or the checksums, which keeps its length."""

    def make(old: bytes) -> bytes:
        header = json.loads(old[8:1024])
        edit(header)
        return old[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(1016)[:1016] + old[1024:]

    return raw(name, make)


def layout(edit: Edit) -> Change:
    """Change the only layout of the manifest, a header of the length that it had where that is possible."""

    def change(root: Path) -> None:
        def update(document: dict[str, Any]) -> None:
            (old,) = document["layouts"]
            header = json.loads(old)
            edit(header)
            document["layouts"] = [json.dumps(header, separators=(",", ":")).ljust(len(old))]

        manifest(update)(root)

    return change


def member(kind: str, make: Callable[[bytes], bytes]) -> Change:
    """Other bytes of the same length in a member of the first clip."""

    def change(root: Path) -> None:
        part = "record" if kind == "json" else "payload"
        start, size = getattr(locate(root)[0], part)
        old = (root / TAR).read_bytes()[start : start + size]
        new = make(old)[:size].ljust(size, b" " if kind == "json" else b"\0")
        replace_bytes(root, TAR, 0, part, new)

    return change


def record(edit: Edit) -> Change:
    def make(old: bytes) -> bytes:
        document = json.loads(old)
        document["meta"] = {}  # room for what the edit adds
        edit(document)
        return json.dumps(document).encode()

    return member("json", make)


def tensors(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the header of the safetensors member; the data that follow move or are cut."""

    def make(old: bytes) -> bytes:
        size = struct.unpack("<Q", old[:8])[0]
        header = json.loads(old[8 : 8 + size])
        edit(header)
        return with_header(json.dumps(header, separators=(",", ":")).encode(), old[8 + size :])

    return member("safetensors", make)


def with_header(header: bytes, rest: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + rest


def tar_header(field: slice, value: bytes, kind: str = "safetensors") -> Change:
    """Overwrite a field of a tar header of the first clip, with a right header checksum."""

    def change(root: Path) -> None:
        clip = locate(root)[0]
        start = (clip.record if kind == "json" else clip.payload).offset - 512
        data = bytearray((root / TAR).read_bytes())
        header = data[start : start + 512]
        header[field] = value.ljust(field.stop - field.start, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[start : start + 512] = header
        (root / TAR).write_bytes(data)
        seal(root, TAR)

    return change


def more_members(*infos: tuple[str, bytes, bytes]) -> Change:
    """Append (name, content, type) to the tar, which the index then does not know of; or before it where wanted."""

    def change(root: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(root / TAR) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as new:
            for info in old:
                new.addfile(info, old.extractfile(info))
            for name, content, kind in infos:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = kind, len(content), "/etc/passwd" if kind in b"12" else ""
                new.addfile(info, io.BytesIO(content))
        (root / TAR).write_bytes(buffer.getvalue())
        seal(root, TAR)

    return change


def replaced(name: str, make: Callable[[Path], Any]) -> Change:
    """Put something else where a file of the set was."""

    def change(root: Path) -> None:
        (root / name).rename(root.parent / f"{root.name}-{name}")  # a link may point there: outside the set
        make(root / name)

    return change


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except OSError:  # only root may; the device itself then serves by a link
        path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def sparse(name: str, size: int) -> Change:
    return lambda root: os.truncate(root / name, size)


def giant_tar(size: int) -> Change:
    def change(root: Path) -> None:
        rewrite_manifest(root, lambda document: document["files"][TAR].update(bytes=size))
        os.truncate(root / TAR, size)

    return change


def million_clips(root: Path, length: int = 8, equal: bool = False) -> None:
    """As many clips as a set may have, in sparse tars, with keys of `length` characters."""
    count = 2**20 - 1  # of the train split
    keys = [f"{0 if equal else number:0{length}d}\n" for number in range(count)] + ["v\n"]

    def change(columns: Columns) -> None:
        for name in ("sums", "identity", "record_bytes", "layout"):
            column = columns[name]
            columns[name] = np.concatenate([np.repeat(column[:1], count), column[-1:]])
        columns["identity"][1:-1] = 1 if len(set(columns["identity"][:-1].tolist())) > 1 else columns["identity"][0]
        columns["clips"][0] = count
        columns["keys"] = "".join(keys).encode()

    clip = locate(root)[0]
    span = clip.payload.offset + -(-clip.payload.size // 512) * 512 - clip.record.offset + 512
    change_index(root, change)
    size = -(-(span * count + 1024) // 10240) * 10240
    rows = 1024 + count * ((root / SUMS).stat().st_size - 1024) // 2

    def update(document: dict[str, Any]) -> None:
        document["splits"]["train"]["samples"] = count
        document["files"][TAR]["bytes"] = size
        document["files"][SUMS]["bytes"] = rows

    rewrite_manifest(root, update)
    os.truncate(root / TAR, size)
    os.truncate(root / SUMS, rows)


def big_clip(root: Path) -> None:
    """The largest clip that is read at all: 64 MiB."""
    shutil.rmtree(root)
    write_fake_shards(root, clips=1, frames=2, height=1000, width=690, validation_clips=0)


def pth() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return buffer.getvalue()


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def nested(depth: int, inside: str = "1") -> str:
    return "[" * depth + inside + "]" * depth


def manifest_value(path: str, text: str) -> Change:
    """Put literal JSON text where the value at `path` (keys separated by /) was."""

    def change(root: Path) -> None:
        document = json.loads((root / MANIFEST).read_bytes())
        *parents, last = path.split("/")
        target = document
        for key in parents:
            target = target[key]
        target[last] = "@@"
        (root / MANIFEST).write_text(json.dumps(document).replace('"@@"', text))

    return change


def set_shards(*names: Any) -> Change:
    return manifest(lambda m: m["splits"]["train"].update(shards=list(names)))


def put(key: str, value: Any) -> Edit:
    """An edit that sets the value at `key` (keys separated by /)."""

    def edit(document: dict[str, Any]) -> None:
        *parents, last = key.split("/")
        for parent in parents:
            document = document[parent]
        document[last] = value

    return edit
