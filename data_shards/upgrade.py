"""A shard set of an older version -> a new set of this version.

The tars stay byte for byte; indexes and manifest are made anew. Every tar is checked against the old manifest while it
is copied, and every clip is read whole, against the old checksums, before the new manifest says that the set is one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from data_shards.clip import read_member, read_whole
from data_shards.files import PARTIAL, open_plain, parse_json, publish, read_document, sync_folder
from data_shards.index import MAX_CLIPS, ClipEntry, check_index, check_member, check_names
from data_shards.manifest import check_version, index_name_of, read_manifest, sealed
from data_shards.payload import tensor_table
from data_shards.reader import Place, check_counts
from data_shards.schema import SHARD_VERSION, SPLITS, ShardError, fail, shown, tags_of
from data_shards.shard import place_tensors, publish_shard, remove_own_files

_BLOCK = 2**20


def upgrade(root: Path, out: Path) -> dict[str, Any]:
    """Write the set in `root`, of an older version, to the new or empty folder `out` as one of this version.

    Returns the new manifest. `root` is only read. `out` gets its manifest last; when something fails, what was written
    is removed, and what an upgrade that was killed has left there is removed at the start.
    Raises ShardError for damage of any kind, a set that has this version already or that no rule leads from, an `out`
    that holds a set or lies inside `root`.
    """
    version = _version_of(root)
    _check_out(root, out)
    manifest = read_manifest(root, version)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        remove_own_files(out)
        files: dict[str, dict[str, Any]] = {}
        places: dict[str, list[Place]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for name in manifest["splits"][split]["shards"]:
                clips, made = _upgrade_shard(root, out, name, manifest, version)
                files.update(made)
                places[split] += [Place(root / name, clip) for clip in clips]
        check_counts(places, manifest, str(root / "manifest.json"))
        new, data = sealed({**manifest, "shard_version": SHARD_VERSION, "files": files}, str(out / "manifest.json"))
        publish(out / "manifest.json", data)
        sync_folder(out)
    except BaseException:
        remove_own_files(out)
        if is_new:
            with suppress(OSError):
                out.rmdir()
        raise
    return new


def _version_of(root: Path) -> int:
    path = root / "manifest.json"
    version = parse_json(read_document(path), str(path)).get("shard_version")
    if type(version) is not int or version not in _RULES:
        older = ", ".join(map(str, _RULES))
        raise ShardError(f"{path}: shard_version: {shown(version)}: expected an older one ({older}) to upgrade")
    return version


def _check_out(root: Path, out: Path) -> None:
    if (out / "manifest.json").exists():
        raise ShardError(f"{out / 'manifest.json'}: a shard set exists here: expected a new or empty folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise ShardError(f"{out}: inside the shard set {root}: expected a folder outside it")


def _upgrade_shard(
    root: Path, out: Path, name: str, manifest: Mapping[str, Any], version: int
) -> tuple[list[ClipEntry], dict[str, dict[str, Any]]]:
    index = _old_index(root, name, manifest, version)
    partial = out / (name + PARTIAL)
    digest = _copy(root / name, partial, manifest["files"][name])
    origin = str(root / name)
    with open_plain(partial) as tar:
        for step in range(version, SHARD_VERSION):
            index = {**_RULES[step](index, tar, origin), "shard_version": step + 1}
        checked = check_index(index, name, str(root / index_name_of(name)))
        for clip in checked.clips:
            read_whole(tar, clip, origin, manifest["extractors"])
    return checked.clips, publish_shard(out, index, digest)


def _old_index(root: Path, name: str, manifest: Mapping[str, Any], version: int) -> dict[str, Any]:
    path = root / index_name_of(name)
    data = read_document(path)
    digest, expected = hashlib.sha256(data).hexdigest(), manifest["files"][path.name]["sha256"]
    if digest != expected:
        raise ShardError(f"{path}: sha256 {digest}: expected {expected}, the manifest's")
    index = parse_json(data, str(path))
    check_version(index, str(path), version)
    tags = tags_of(manifest["extractors"])
    if index.get("extractors") != tags:
        raise ShardError(f"{path}: extractors: {shown(index.get('extractors'))}: expected {tags}, the manifest's tags")
    return index


def _copy(source: Path, target: Path, expected: Mapping[str, Any]) -> str:
    """Copy a tar; its sha256, which is that of the manifest."""
    digest = hashlib.sha256()
    with open_plain(source) as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        if size != expected["bytes"]:
            raise ShardError(f"{source}: {size} bytes: expected {expected['bytes']}, the manifest's (truncated)")
        while block := old.read(_BLOCK):
            digest.update(block)
            new.write(block)
        new.flush()
        os.fsync(new.fileno())
    if digest.hexdigest() != expected["sha256"]:
        raise ShardError(f"{source}: sha256 {digest.hexdigest()}: expected {expected['sha256']}, the manifest's")
    return digest.hexdigest()


def _from_1(index: Mapping[str, Any], tar: FileIO, origin: str) -> dict[str, Any]:
    """Version 2 records where each tensor lies, and a checksum of each of its latent frames."""
    samples = index.get("samples")
    if not isinstance(samples, list) or len(samples) > MAX_CLIPS:
        value = f"{len(samples)} samples" if isinstance(samples, list) else shown(samples)
        raise ShardError(f"{origin}: samples: {value}: expected a list of at most {MAX_CLIPS} clips")
    entries = []
    for sample in samples:
        key = check_names(sample if isinstance(sample, dict) else {}, origin)[0]
        payload = read_member(tar, key, check_member(sample, "safetensors", origin), origin)
        table = tensor_table(payload, f"{origin}: sample {key!r}: {key}.safetensors")
        stated = {name: {"dtype": tensor["dtype"], "shape": tensor["shape"]} for name, tensor in table.items()}
        if sample.get("tensors") != stated:
            raise fail(origin, key, "tensors", shown(sample.get("tensors")), "those of the safetensors member")
        entry = {**sample, "tensors": table}
        place_tensors(entry)
        entries.append(entry)
    return {**index, "samples": entries}


# Version -> what turns the index of a shard, whose tar is at hand, into one of the next version.
_RULES: dict[int, Callable[[Mapping[str, Any], FileIO, str], dict[str, Any]]] = {1: _from_1}
