"""Tiny shard sets of random tensors that keep the whole contract, for tests of anything that reads shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.files import encode_json
from data_shards.manifest import sealed
from data_shards.payload import tensor_table
from data_shards.schema import ClipSample
from data_shards.shard import place_tensors
from data_shards.writer import ShardSetWriter

FLAME_WIDTH = 56


def fake_extractors(
    *,
    channels: int = 16,
    height: int = 4,
    width: int = 4,
    struct_dim: int = 8,
    audio_dim: int = 12,
    flame: bool = False,
    text_dim: int | None = None,
) -> dict[str, dict[str, Any]]:
    """A table with the tag of the real video codec (its latents decode) and tags of its own for the rest."""
    table: dict[str, dict[str, Any]] = {
        "video": {"tag": "dct-4x8x8-16-v1", "channels": channels, "height": height, "width": width},
        "motion": {"tag": "random-motion-v1", "width": struct_dim, "names": [f"m{i}" for i in range(struct_dim)]},
        "audio": {"tag": "random-audio-v1", "width": audio_dim, "hz": 50},
    }
    if flame:
        table["flame"] = {"tag": "random-flame-v1", "width": FLAME_WIDTH}
    if text_dim is not None:
        table["text"] = {"tag": "random-text-v1", "width": text_dim}
    return table


def fake_sample(
    key: str,
    identity: str,
    extractors: dict[str, dict[str, Any]],
    *,
    frames: int = 9,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    text_tokens: int = 3,
) -> ClipSample:
    """A clip of random tensors; streams move around different means so that a wrong normalisation shows."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    video = extractors["video"]
    latent = (video["channels"], video["height"], video["width"])
    struct = 2.0 * random(frames, 4, extractors["motion"]["width"]) + 1.0
    struct[0] = struct[0, :1]
    audio = 0.5 * random(frames, 8, extractors["audio"]["width"]) - 3.0
    audio[0, :7] = audio[0, :1]
    flame = flame_valid = text = None
    if "flame" in extractors:
        flame = random(frames, 4, extractors["flame"]["width"])
        flame[0] = flame[0, :1]
        flame_valid = torch.rand(frames, 4, generator=generator) < 0.8
    if "text" in extractors:
        text = random(text_tokens, extractors["text"]["width"]).to(dtype)
    clip = 1.5 * random(frames, *latent) + 0.25
    clip[0] *= 2.0
    return ClipSample(
        key=key,
        identity=identity,
        video=clip.to(dtype),
        reference=clip[0].to(dtype),
        struct=struct,
        audio=audio.to(torch.float16),
        voiced=torch.rand(frames, generator=generator) < 0.7,
        flame=flame,
        flame_valid=flame_valid,
        text=text,
        meta={"source": f"{identity}.mp4", "first_pixel_frame": 0, "licence": "CC0-1.0"},
    )


def write_fake_shards(
    root: Path,
    *,
    clips: int = 8,
    frames: int = 9,
    height: int = 4,
    width: int = 4,
    struct_dim: int = 8,
    audio_dim: int = 12,
    flame: bool = False,
    text_dim: int | None = None,
    seed: int = 0,
    validation_clips: int = 2,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 10**9,
) -> Path:
    """Write `clips` training and `validation_clips` held-out clips of `frames` latent frames; returns `root`."""
    extractors = fake_extractors(
        height=height, width=width, struct_dim=struct_dim, audio_dim=audio_dim, flame=flame, text_dim=text_dim
    )
    with ShardSetWriter(root, extractors, shard_bytes=shard_bytes) as writer:
        for number in range(clips + validation_clips):
            split = "train" if number < clips else "validation"
            key, identity = f"{split}-{number:04d}", f"{split}-id{number // 2:02d}"
            writer.add(
                split, fake_sample(key, identity, extractors, frames=frames, seed=seed * 10_007 + number, dtype=dtype)
            )
        writer.finish([], {"made_by": "write_fake_shards"})
    return root


def replace_member(root: Path, tar_name: str, name: str, data: bytes) -> None:
    """Put other bytes into a member, with an index and checksums that agree, as a faulty writer would have done.

    Bytes that are no safetensors file must have the size of what they replace: the index keeps its places then.
    """
    path = root / tar_name
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for info in old:
            content = data if info.name == name else old.extractfile(info).read()  # type: ignore[union-attr]
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())

    def update(index: dict[str, Any]) -> None:
        with tarfile.open(path) as tar:
            for entry in index["samples"]:
                for kind, member in entry["members"].items():
                    info = tar.getmember(member["name"])
                    content = tar.extractfile(info).read()  # type: ignore[union-attr]
                    moved = info.offset_data - member["offset"]
                    member.update(offset=info.offset_data, size=info.size, crc32=zlib.crc32(content))
                    if kind == "safetensors" and content[8:9] == b"{":
                        entry["tensors"] = tensor_table(content, "")
                        place_tensors(entry)
                    elif kind == "safetensors":
                        for tensor in entry["tensors"].values():
                            tensor["offset"] += moved
        index["bytes"] = path.stat().st_size

    change_index(root, tar_name, update)


def change_index(root: Path, tar_name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter the index of a tar, and give the manifest the sums that then hold."""
    name = tar_name.replace(".tar", ".index.json")
    rewrite(root / name, change)
    data = (root / name).read_bytes()
    tar = (root / tar_name).read_bytes()

    def update(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][tar_name] = {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}

    rewrite_manifest(root, update)


def rewrite_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` alter the manifest, with a checksum that agrees where version 2 has one."""
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


def age_to_version_1(root: Path) -> Path:
    """Turn a set into the one that version 1 wrote of the same clips: tensors without place and checksums."""
    for path in sorted(root.glob("*.index.json")):
        index = json.loads(path.read_bytes())
        index["shard_version"] = 1
        for entry in index["samples"]:
            for tensor in entry["tensors"].values():
                del tensor["offset"], tensor["crc32"]
        path.write_bytes(encode_json(index, path.name))
    manifest = json.loads((root / "manifest.json").read_bytes())
    manifest["shard_version"] = 1
    del manifest["sha256"]
    for path in root.glob("*.index.json"):
        data = path.read_bytes()
        manifest["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_bytes(encode_json(manifest, "manifest.json", indent=1))
    return root
