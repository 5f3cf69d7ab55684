"""manifest.json: the version and the type of every key, before anything relies on them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data_shards.files import MAX_JSON_BYTES, MAX_JSON_VALUES, Folder, count_values, encode_json, parse_json
from data_shards.index import INDEX_NAME
from data_shards.layout import Layout, parse_layout
from data_shards.schema import FPS, MAX_CLIP_BYTES, SHARD_VERSION, SPLITS, ShardError, at, check_extractors, shown

MANIFEST_NAME = "manifest.json"
NOT_LISTED = "rejected_not_listed"  # in `info`: how many rejections of each reason a manifest had no room for
MAX_LAYOUTS = 64
# Bytes and values of a manifest: kept for what is neither of an identity, nor of a tar, nor a rejection; of a tar, at
# most; and of the numbers by reason that stand for rejections without room.
RESERVE, _TAR, _SLACK = (2**21, 50_000), (344, 7), (2**14, 200)

_TAR_NAME = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{6}}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEAL = b'\n "sha256": "'  # one blank: at the top level, and a text in JSON holds no line break
_BLANK = "0" * 64
_KINDS: dict[str, type] = {"extractors": dict, "splits": dict, "files": dict, "statistics": dict, "frames": int,
                           "layouts": list, "rejected": list, "info": dict}  # fmt: skip
_LAYOUTS_SINCE = 3  # version
_OPTIONAL = ("rejected", "info")
_NAMES: dict[type, str] = {dict: "an object", list: "a list", int: "a whole number of at least 1"}


def read_manifest(source: Folder, version: int = SHARD_VERSION) -> dict[str, Any]:
    """The manifest of the set in `source`; ShardError for another version, or a key that is absent or not what it
    should be. Names of tars in it are safe to join to a folder."""
    origin = source.label(MANIFEST_NAME)
    data = source.document(MANIFEST_NAME)
    manifest = parse_json(data, origin)
    check_version(manifest, origin, version)
    if version > 1 and "sha256" not in manifest:
        raise ShardError(f"{origin}: sha256: absent: expected the checksum of the manifest")
    if version > 1 and _SEAL in data:
        # Damage leaves the layout as it was. A manifest in another one was edited, which only `verify` objects to.
        check_sealed(data, origin)
    kinds = _KINDS if version >= _LAYOUTS_SINCE else {key: kind for key, kind in _KINDS.items() if key != "layouts"}
    for key, kind in kinds.items():
        if key not in manifest and key not in _OPTIONAL:
            raise ShardError(f"{origin}: {key}: absent: expected the key of a shard manifest")
        if key in manifest and type(manifest[key]) is not kind:
            raise ShardError(f"{origin}: {key}: {shown(manifest[key])}: expected {_NAMES[kind]}")
    check_extractors(manifest["extractors"], origin)
    if not 1 <= manifest["frames"] <= MAX_CLIP_BYTES:
        raise ShardError(f"{origin}: frames: {shown(manifest['frames'])}: expected a whole number of at least 1")
    if manifest.get("fps", FPS) != FPS:
        raise ShardError(f"{origin}: fps: {shown(manifest['fps'])}: expected {FPS}")
    for name, entry in manifest["files"].items():
        _check_file(name, entry, origin)
    for split in SPLITS:
        _check_split(split, manifest, sums_name_of if version >= _LAYOUTS_SINCE else old_index_name_of, origin)
    if version >= _LAYOUTS_SINCE:
        if INDEX_NAME not in manifest["files"]:
            raise ShardError(f"{origin}: files.{INDEX_NAME}: absent: expected size and sha256 of the index")
        if not 1 <= len(manifest["layouts"]) <= MAX_LAYOUTS:
            raise ShardError(f"{origin}: layouts: {len(manifest['layouts'])}: expected 1 to {MAX_LAYOUTS}")
    return manifest


def read_layouts(manifest: Mapping[str, Any], origin: str) -> tuple[Layout, ...]:
    """The manifest's `layouts`, all of its extractors and frames, with one number of text tokens."""
    found: list[Layout] = []
    for number, text in enumerate(manifest["layouts"]):
        place = f"{origin}: layouts[{number}]"
        layout = parse_layout(text, manifest["extractors"], place)
        if layout.frames != manifest["frames"]:
            raise at(place, "video", f"{layout.frames} latent frames", f"{manifest['frames']}, the manifest's frames")
        if found and layout.tokens != found[0].tokens:
            raise at(place, "text", f"{layout.tokens} tokens", f"{found[0].tokens}, as in layouts[0]")
        found.append(layout)
    return tuple(found)


def sealed(manifest: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], bytes]:
    """The manifest with a checksum of itself, as a reader will find it, and its bytes on disk."""
    data = encode_json({**manifest, "sha256": _BLANK}, origin, indent=1)
    data = data.replace(_SEAL + _BLANK.encode(), _SEAL + hashlib.sha256(data).hexdigest().encode(), 1)
    return parse_json(data, origin), data


def check_seal(source: Folder) -> None:
    """ShardError if a byte of manifest.json is not as it was written."""
    check_sealed(source.document(MANIFEST_NAME), source.label(MANIFEST_NAME))


class Room(NamedTuple):
    """What the identities of a set take of its manifest, of which a reader refuses a larger one."""

    names: int = 0
    size: int = 0  # bytes
    values: int = 0

    def plus(self, identity: str) -> Room:
        """With one that was not there before."""
        size, values = _cost(identity, identity, 4)
        return Room(self.names + 1, self.size + size, self.values + values)

    def check(self, tars: int, origin: str) -> None:
        """ShardError, of one line that begins with `origin`, if a set of these identities and `tars` tars has no
        room."""
        size, values = self.size + tars * _TAR[0], self.values + tars * _TAR[1]
        most = MAX_JSON_BYTES - RESERVE[0], MAX_JSON_VALUES - RESERVE[1]
        if size > most[0] or values > most[1]:
            raise ShardError(
                f"{origin}: {self.names} identities in {tars} tars: {size} bytes with {values} values in the manifest: "
                f"expected at most {most[0]} with {most[1]} in one set"
            )


def room_of(identities: Iterable[str]) -> Room:
    """Of all these, each of which may come several times."""
    room = Room()
    for name in set(identities):
        room = room.plus(name)
    return room


def listed(
    rejected: Sequence[Mapping[str, Any]], rest: Mapping[str, Any], origin: str
) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """The entries of `rejected`, from the first on, that fit into a part of what a manifest may hold beside its `rest`;
    and how many of the others have which reason. A reader refuses a larger manifest."""
    data = encode_json(rest, origin, indent=1)
    # Not all that is left: sets made of this one have a little more to say.
    size = min(MAX_JSON_BYTES // 3, MAX_JSON_BYTES - len(data) - _SLACK[0])
    values = min(MAX_JSON_VALUES * 5 // 8, MAX_JSON_VALUES - count_values(data) - _SLACK[1])
    for number, entry in enumerate(rejected):
        more_size, more_values = _cost(entry, f"{origin}: rejected[{number}]", 2)
        size, values = size - more_size, values - more_values
        if size < 0 or values < 0:
            more = Counter(str(entry.get("reason")) for entry in rejected[number:])
            return list(rejected[:number]), dict(sorted(more.items()))
    return list(rejected), {}


def _cost(value: Any, origin: str, depth: int) -> tuple[int, int]:
    """Bytes and values, at most, of an item of a list that lies `depth` levels deep in a manifest."""
    data = encode_json(value, origin, indent=1)
    return len(data) + depth * data.count(b"\n") + 1, count_values(data) + 1


def set_hash(manifest: Mapping[str, Any]) -> str:
    """sha256, in hexadecimal, over the lines "SPLIT SHA256-OF-TAR", tar after tar.

    Tars hold all that clips are, keys and tags included, and their order; so equal clips in equal order have equal
    hashes wherever they lie, and whatever else the manifest says. An upgrade keeps it.
    """
    lines = (
        f"{split} {manifest['files'][name]['sha256']}\n"
        for split in SPLITS
        for name in manifest["splits"][split]["shards"]
    )
    return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()


def check_sealed(data: bytes, origin: str) -> None:
    """The same of its bytes."""
    start = data.find(_SEAL) + len(_SEAL)
    if start < len(_SEAL):
        raise ShardError(f"{origin}: sha256: not on a line of its own: expected the layout that the writer gave it")
    found = data[start : start + len(_BLANK)]
    expected = hashlib.sha256(data[:start] + _BLANK.encode() + data[start + len(_BLANK) :]).hexdigest()
    if found != expected.encode():
        value = shown(found.decode("ascii", "replace"), raw=True)
        raise ShardError(f"{origin}: sha256: {value}: expected {expected}, that of the manifest with zeros for it")


def check_version(document: Mapping[str, Any], origin: str, version: int = SHARD_VERSION) -> None:
    """ShardError unless `document` is of `version`; an older set is told how it becomes a new one."""
    found = document.get("shard_version")
    if type(found) is int and found == version:
        return
    older = type(found) is int and 1 <= found < SHARD_VERSION and version == SHARD_VERSION
    hint = " (make a set of this version with: dualforce data upgrade OLD NEW)" if older else ""
    raise ShardError(f"{origin}: shard_version: {shown(found)}: expected {version}{hint}")


def lacks_flame(manifest: Mapping[str, Any]) -> bool:
    """Whether the clips have FLAME of which the manifest, made before they were kept, has no statistics."""
    return "flame" in manifest["extractors"] and "flame" not in manifest["statistics"]


def sums_name_of(tar_name: str) -> str:
    """Name of the checksums beside a tar."""
    return f"{tar_name.removesuffix('.tar')}.sums.safetensors"


def old_index_name_of(tar_name: str) -> str:
    """Name of the index that versions 1 and 2 had beside a tar."""
    return f"{tar_name.removesuffix('.tar')}.index.json"


def _check_file(name: str, entry: Any, origin: str) -> None:
    field = f"files.{shown(name, raw=True)}"
    if not isinstance(entry, dict):
        raise ShardError(f"{origin}: {field}: {shown(entry)}: expected an object")
    if type(entry.get("bytes")) is not int or not 0 <= entry["bytes"] < 2**62:
        raise ShardError(f"{origin}: {field}.bytes: {shown(entry.get('bytes'))}: expected a whole number of at least 0")
    if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
        raise ShardError(f"{origin}: {field}.sha256: {shown(entry.get('sha256'))}: expected 64 digits of 0-9 a-f")


def _check_split(split: str, manifest: Mapping[str, Any], beside: Callable[[str], str], origin: str) -> None:
    listed = manifest["splits"].get(split)
    if not isinstance(listed, dict):
        raise ShardError(f"{origin}: splits.{split}: {shown(listed)}: expected an object")
    if type(listed.get("samples")) is not int or not 0 <= listed["samples"] < 2**62:
        value = shown(listed.get("samples"))
        raise ShardError(f"{origin}: splits.{split}.samples: {value}: expected a whole number of at least 0")
    for key in ("shards", "identities"):
        names = listed.get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ShardError(f"{origin}: splits.{split}.{key}: {shown(names)}: expected a list of names")
        if len(set(names)) != len(names):
            raise ShardError(f"{origin}: splits.{split}.{key}: a name twice: expected every name once")
    for name in listed["shards"]:
        found = _TAR_NAME.fullmatch(name)
        if not found or found[1] != split:
            raise ShardError(f"{origin}: splits.{split}.shards: {shown(name)}: expected {split}-NNNNNN.tar")
        for file in (name, beside(name)):
            if file not in manifest["files"]:
                raise ShardError(f"{origin}: files.{file}: absent: expected size and sha256 of every file")
