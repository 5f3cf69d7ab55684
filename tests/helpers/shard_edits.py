"""Changes to the files of a shard set, with sums that then agree: what a faulty writer or a hostile author would do."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file
from xxhash import xxh3_64_intdigest

from data_shards.columns import encode_columns
from data_shards.files import encode_json
from data_shards.index import index_forms, sums_forms
from data_shards.layout import parse_layout, row_of
from data_shards.manifest import sealed
from data_shards.reader import ShardSet
from data_shards.schema import SPLITS, ShardError, tags_of

Columns = dict[str, Any]


class Bytes(NamedTuple):
    """Where something lies in a file."""

    offset: int
    size: int


class Located(NamedTuple):
    """Where a clip lies in its tar. Tensors: of the whole, and how many parts have a checksum each."""

    key: str
    record: Bytes
    payload: Bytes
    header: bytes
    tensors: dict[str, Bytes]
    parts: dict[str, int]


def locate(root: Path, split: str = "train") -> list[Located]:
    """Every clip of a split of a set that opens."""
    reader = ShardSet.open(root).split(split)
    found = []
    for place in (reader._index.place(clip) for clip in reader._clips):
        record = Bytes(place.start + 512, place.record_bytes)
        layout = place.layout
        payload = Bytes(record.offset - -record.size // 512 * 512 + 512, layout.size)
        data = payload.offset + len(layout.header)
        tensors = {part.name: Bytes(data + part.offset, part.size) for part in layout.parts}
        parts = {part.name: part.frames for part in layout.parts}
        found.append(Located(place.key, record, payload, layout.header, tensors, parts))
    return found


def sums_name(tar_name: str) -> str:
    return tar_name.replace(".tar", ".sums.safetensors")


def number_of_tar(root: Path, tar_name: str) -> int:
    splits = json.loads((root / "manifest.json").read_bytes())["splits"]
    return [name for split in SPLITS for name in splits[split]["shards"]].index(tar_name)


def change_index(root: Path, change: Callable[[Columns], object]) -> None:
    """Let `change` alter the columns of the index, of which `keys` is bytes, and give the manifest the sum."""
    path = root / "index.safetensors"
    columns: Columns = {name: column.copy() for name, column in load_file(path).items()}
    columns["keys"] = columns["keys"].tobytes()
    change(columns)
    columns["keys"] = np.frombuffer(columns["keys"], np.uint8)
    forms = index_forms(len(columns["sums"]), len(columns["keys"]), len(columns["clips"]))
    path.write_bytes(encode_columns(forms, columns))
    seal(root, path.name)


def change_rows(root: Path, tar_name: str, change: Callable[[Any], object]) -> None:
    """Let `change` alter the checksums [N, words] beside a tar, with an index that agrees."""
    path = root / sums_name(tar_name)
    rows = load_file(path)["xxh3_64"].copy()
    change(rows)
    path.write_bytes(encode_columns(sums_forms(*rows.shape), {"xxh3_64": rows}))
    sums = [xxh3_64_intdigest(row.tobytes()) for row in rows]

    def update(columns: Columns) -> None:
        start = int(columns["clips"][: number_of_tar(root, tar_name)].sum())
        columns["sums"][start : start + len(sums)] = sums

    change_index(root, update)
    seal(root, path.name, tar_name)


def resum(root: Path, tar_name: str, number: int, located: Located) -> None:
    """Give clip `number` of a tar the checksums of the bytes that lie where it lay."""
    data = (root / tar_name).read_bytes()
    record, payload = (data[b.offset : b.offset + b.size] for b in (located.record, located.payload))
    manifest = json.loads((root / "manifest.json").read_bytes())
    layout = parse_layout(located.header[8:].decode(), manifest["extractors"], "layout")
    row = row_of(record, payload, layout)
    change_rows(root, tar_name, lambda rows: rows.__setitem__(number, np.array(row, np.uint64)))


def replace_bytes(root: Path, tar_name: str, number: int, kind: str, new: bytes, split: str = "train") -> None:
    """Other bytes of the same length in the "record" or "payload" of a clip, with checksums that agree."""
    located = locate(root, split)[number]
    place: Bytes = getattr(located, kind)
    assert len(new) == place.size
    data = bytearray((root / tar_name).read_bytes())
    data[place.offset : place.offset + place.size] = new
    (root / tar_name).write_bytes(data)
    resum(root, tar_name, number, located)


def replace_member(root: Path, tar_name: str, name: str, data: bytes) -> None:
    """Put other bytes into a member, with layout, index and checksums that agree, as a faulty writer would have done.

    Bytes that are no safetensors file must have the size of what they replace: the layout stays then.
    """
    path = root / tar_name
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        names = old.getnames()
        for info in old:
            content = data if info.name == name else old.extractfile(info).read()  # type: ignore[union-attr]
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    number, kind = names.index(name) // 2, name.rsplit(".", 1)[1]
    manifest = json.loads((root / "manifest.json").read_bytes())
    first = int(load_file(root / "index.safetensors")["clips"][: number_of_tar(root, tar_name)].sum())
    layouts = manifest["layouts"]
    if kind == "json":
        change_index(root, lambda c: c["record_bytes"].__setitem__(first + number, len(data)))
    elif data[8:9] == b"{":
        text = data[8 : 8 + struct.unpack("<Q", data[:8])[0]].decode()
        if text not in layouts:
            layouts = [*layouts, text]
            rewrite_manifest(root, lambda m: m.update(layouts=layouts))
        change_index(root, lambda c: c["layout"].__setitem__(first + number, layouts.index(text)))
    seal(root, tar_name)
    with suppress(ShardError):  # a layout that no reader accepts, or a tar that its clips do not fill
        split = tar_name.split("-")[0]
        start = first if split == "train" else first - manifest["splits"]["train"]["samples"]
        resum(root, tar_name, number, locate(root, split)[start + number])


def seal(root: Path, *names: str) -> None:
    """Give the manifest the sums of these files as they are."""

    def update(manifest: dict[str, Any]) -> None:
        for name in names:
            data = (root / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite_manifest(root, update)


def rewrite_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter the manifest, with a checksum that agrees where its version has one."""
    path = root / "manifest.json"
    rewrite(path, change)
    manifest = json.loads(path.read_bytes())
    if "sha256" in manifest:
        path.write_bytes(sealed(manifest, str(path))[1])


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter a JSON document in place."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def age(root: Path, version: int) -> Path:
    """Turn a set into the one that version 1 or 2 wrote of the same clips."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    for split in SPLITS:
        for tar_name in manifest["splits"][split]["shards"]:
            size, entries = (root / tar_name).stat().st_size, _old_entries(root / tar_name, version)
            index = {"shard_version": version, "shard": tar_name, "bytes": size, "samples": entries,
                     "extractors": tags_of(manifest["extractors"])}  # fmt: skip
            data, name = encode_json(index, ""), tar_name.replace(".tar", ".index.json")
            (root / name).write_bytes(data)
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for path in root.glob("*.safetensors"):
        path.unlink()
        del manifest["files"][path.name]
    manifest["shard_version"] = version
    del manifest["layouts"], manifest["sha256"]
    manifest["statistics"].pop("flame", None)
    document = encode_json(manifest, "", indent=1) if version == 1 else sealed(manifest, "")[1]
    (root / "manifest.json").write_bytes(document)
    return root


def without_flame_statistics(root: Path) -> Path:
    """Turn a set into one of this version from before statistics of FLAME were kept."""

    def forget(manifest: dict[str, Any]) -> None:
        del manifest["statistics"]["flame"]

    rewrite_manifest(root, forget)
    return root


def _old_entries(tar_path: Path, version: int) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    with tarfile.open(tar_path) as tar:
        for info in tar:
            content = tar.extractfile(info).read()  # type: ignore[union-attr]
            key, kind = info.name.rsplit(".", 1)
            entry = entries.setdefault(key, {"key": key, "members": {}})
            entry["members"][kind] = {"name": info.name, "offset": info.offset_data, "size": info.size,
                                      "crc32": zlib.crc32(content)}  # fmt: skip
            if kind == "json":
                record = json.loads(content)
                entry |= {"identity": record["identity"], "frames": record["frames"]}
            else:
                entry["tensors"] = _old_tensors(content, info.offset_data, version)
    return list(entries.values())


def _old_tensors(payload: bytes, start: int, version: int) -> dict[str, Any]:
    size = struct.unpack("<Q", payload[:8])[0]
    header, table = json.loads(payload[8 : 8 + size]), {}
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "BOOL": "bool"}
    for name, entry in header.items():
        table[name] = {"dtype": names[entry["dtype"]], "shape": entry["shape"]}
        if version == 2:
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            parts = 1 if name in ("reference", "text") else entry["shape"][0]
            stride = (end - begin) // parts
            sums = [zlib.crc32(payload[begin + i * stride : begin + (i + 1) * stride]) for i in range(parts)]
            table[name] |= {"offset": start + begin, "crc32": "".join(f"{x:08x}" for x in sums)}
    return table
