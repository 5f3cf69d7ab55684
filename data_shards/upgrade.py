"""A shard set of an older version, or one without statistics of its FLAME -> a new set of this version.

The tars stay byte for byte; all else is made anew. Every tar is checked against the old manifest while it is copied,
every clip against the old checksums; and then the new set is read, whole, before a manifest says that it is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_shards.claim import Claim, check_free
from data_shards.files import PARTIAL, Folder, parse_json, publish, sync_folder, writing
from data_shards.index import INDEX_NAME
from data_shards.layout import Layout, header_text, parse_layout
from data_shards.manifest import (
    MANIFEST_NAME,
    check_version,
    lacks_flame,
    old_index_name_of,
    read_manifest,
    sealed,
    sums_name_of,
)
from data_shards.moments import FlameMoments
from data_shards.old_index import OldClip, check_bytes, old_clips, tensors_of_1, tensors_of_2
from data_shards.reader import ShardSet
from data_shards.schema import SHARD_VERSION, SPLITS, ShardError, fail, shown, tags_of
from data_shards.shard import Written, publish_index, publish_shard, without_rows, written


def upgrade(root: Path, out: Path) -> dict[str, Any]:
    """Write the set in `root`, of an older version, to the new or empty folder `out` as one of this version; or a set
    of this version that has FLAME and, made before they were kept, no statistics of it, as one that has them.

    Returns the new manifest. `root` is only read. `out` gets its manifest last; when something fails, what was written
    is removed, and what an upgrade that was killed has left there is removed at the start; other files never.
    Raises ShardError for damage of any kind, a set that has this version already or that no rule leads from, an `out`
    that holds a set or shards of others, or lies inside `root`.
    """
    source = Folder(root)
    version = _version_of(source)
    _check_out(root, out)
    manifest = read_manifest(source, version)
    is_new = not out.exists()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            return _claimed(source, manifest, version, out)
        except BaseException:
            if is_new:
                with suppress(OSError):
                    out.rmdir()
            raise


def _claimed(source: Folder, manifest: Mapping[str, Any], version: int, out: Path) -> dict[str, Any]:
    claim = Claim(out)
    try:
        claim.add(*(name.removesuffix(".tar") for split in SPLITS for name in manifest["splits"][split]["shards"]))
        new, data = _written(source, manifest, version, out)
        claim.check()
        publish(out / MANIFEST_NAME, data)
        sync_folder(out)
    except BaseException:
        claim.clear()
        raise
    claim.release()
    return new


def _written(source: Folder, manifest: Mapping[str, Any], version: int, out: Path) -> tuple[dict[str, Any], bytes]:
    """All files but the manifest; the manifest, and its bytes."""
    new = _copied(source, manifest, out) if version == SHARD_VERSION else _remade(source, manifest, version, out)
    flame = _read_all(ShardSet(Folder(out, called=source.root), new))
    if flame:
        new["statistics"] = {**new["statistics"], "flame": flame}
    return sealed(new, str(out / MANIFEST_NAME))


def _version_of(source: Folder) -> int:
    label = source.label(MANIFEST_NAME)
    version = parse_json(source.document(MANIFEST_NAME), label).get("shard_version")
    if type(version) is int and version == SHARD_VERSION and lacks_flame(read_manifest(source)):
        return version
    if type(version) is not int or version not in _RULES:
        older = ", ".join(map(str, _RULES))
        raise ShardError(f"{label}: shard_version: {shown(version)}: expected an older one ({older}) to upgrade")
    return version


def _check_out(root: Path, out: Path) -> None:
    check_free(out)
    if out.resolve().is_relative_to(root.resolve()):
        raise ShardError(f"{out}: inside the shard set {root}: expected a folder outside it")


def _copied(source: Folder, manifest: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Copy the files of a set of this version, and no others; its manifest."""
    tars = [name for split in SPLITS for name in manifest["splits"][split]["shards"]]
    files = {name: manifest["files"][name] for name in (INDEX_NAME, *tars, *map(sums_name_of, tars))}
    for name, entry in files.items():
        _copy(source, name, out / name, entry)
    return {**manifest, "files": files}


def _remade(source: Folder, manifest: Mapping[str, Any], version: int, out: Path) -> dict[str, Any]:
    """Copy the tars of an older set and make all else; the manifest, without its checksum."""
    files: dict[str, dict[str, Any]] = {}
    shards: dict[str, list[list[Written]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for name in manifest["splits"][split]["shards"]:
            clips, made = _upgrade_shard(source, out, name, manifest, version)
            files.update(made)
            shards[split].append(clips)
    return _new_manifest(source, manifest, shards, files, out)


def _upgrade_shard(
    source: Folder, out: Path, name: str, manifest: Mapping[str, Any], version: int
) -> tuple[list[Written], dict[str, dict[str, Any]]]:
    label, partial = source.label(name), name + PARTIAL
    old = old_clips(_old_index(source, name, manifest, version), name, source.label(old_index_name_of(name)))
    digest = _copy(source, name, out / partial, manifest["files"][name])
    layouts: dict[str, Layout] = {}
    clips = []
    for clip in old:
        record, payload = bytearray(clip.record.size), bytearray(clip.payload.size)
        ranges = [(clip.record.offset, memoryview(record)), (clip.payload.offset, memoryview(payload))]
        Folder(out).fill(partial, ranges)
        check_bytes(clip, record, payload, label)
        place = f"{label}: sample {clip.key!r}: {clip.key}.safetensors"
        text = header_text(payload, place)
        if text not in layouts:
            layouts[text] = parse_layout(text, manifest["extractors"], place)
        _check_old(clip, payload, layouts[text], manifest, _RULES[version], label)
        clips.append(written(clip.key, clip.identity, record, payload, layouts[text]))
    made = publish_shard(out, name, clips, digest)
    return without_rows(clips), made


def _check_old(
    clip: OldClip, payload: bytearray, layout: Layout, manifest: Mapping[str, Any], rule: Rule, origin: str
) -> None:
    for what, real, stated in (
        ("size", layout.size, clip.payload.size),
        ("frames", layout.frames, clip.frames),
        ("frames", manifest["frames"], clip.frames),
        ("tensors", rule(clip, payload, layout), clip.tensors),
    ):
        if real != stated:
            raise fail(origin, clip.key, what, shown(stated), f"{shown(real)}, those of the safetensors member")


def _new_manifest(
    source: Folder,
    manifest: Mapping[str, Any],
    shards: Mapping[str, list[list[Written]]],
    files: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    splits = {name: {**manifest["splits"][name]} for name in SPLITS}
    for name, split in splits.items():
        count = sum(map(len, shards[name]))
        if count != split["samples"]:
            field = f"{source.label(MANIFEST_NAME)}: splits.{name}.samples"
            raise ShardError(f"{field}: {split['samples']}: expected {count}, the indexes'")
        split["identities"] = sorted(split["identities"])
        known = set(split["identities"])
        for tar, clips in zip(split["shards"], shards[name], strict=True):
            for clip in clips:
                if clip.identity not in known:
                    expected = f"one that the manifest lists under splits.{name}"
                    raise fail(source.label(tar), clip.key, "identity", clip.identity, expected)
    layouts, made = publish_index(out, shards, {name: splits[name]["identities"] for name in SPLITS})
    new = {**manifest, "shard_version": SHARD_VERSION, "splits": splits, "layouts": layouts}
    return {**new, "files": {**files, **made}}


def _read_all(opened: ShardSet) -> dict[str, Any] | None:
    """Read every clip; the statistics of FLAME in the train split, if there is any."""
    moments = FlameMoments()
    for name in SPLITS:
        reader = opened.split(name)
        for index in range(len(reader)):
            clip = reader.read(index)
            if name == SPLITS[0]:
                moments.add(clip)
    opened.check_ends()
    return moments.entry()


def _old_index(source: Folder, name: str, manifest: Mapping[str, Any], version: int) -> dict[str, Any]:
    file = old_index_name_of(name)
    label, data = source.label(file), source.document(file)
    digest, expected = hashlib.sha256(data).hexdigest(), manifest["files"][file]["sha256"]
    if digest != expected:
        raise ShardError(f"{label}: sha256 {digest}: expected {expected}, the manifest's")
    index = parse_json(data, label)
    check_version(index, label, version)
    tags = tags_of(manifest["extractors"])
    if index.get("extractors") != tags:
        raise ShardError(f"{label}: extractors: {shown(index.get('extractors'))}: expected {tags}, the manifest's tags")
    return index


def _copy(source: Folder, name: str, target: Path, expected: Mapping[str, Any]) -> str:
    """Copy a tar; its sha256, which is that of the manifest."""
    label, size = source.label(name), source.size(name)
    if size != expected["bytes"]:
        raise ShardError(f"{label}: {size} bytes: expected {expected['bytes']}, the manifest's (truncated)")
    digest = source.copy(name, target)
    if digest != expected["sha256"]:
        raise ShardError(f"{label}: sha256 {digest}: expected {expected['sha256']}, the manifest's")
    return digest


Rule = Callable[[OldClip, bytearray, Layout], dict[str, dict[str, Any]]]

# Version -> what its index must say of the tensors of a clip. What this version says is made from the bytes alone.
_RULES: dict[int, Rule] = {1: tensors_of_1, 2: tensors_of_2}
