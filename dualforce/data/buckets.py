"""The shard sets that a run trains on, one bucket of length x resolution each: what they must share, and what follows
from all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_shards.alike import check_clips_once, check_extractors_alike, check_identities_apart
from data_shards.manifest import MANIFEST_NAME
from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import ShardError, shown
from dualforce.data.bucket_order import BucketSize, joint_hash
from dualforce.data.statistics import StreamStatistics, pooled_statistics
from dualforce.types import AUDIO_FRAMES, STRUCT_TOKENS

FREE = {"video": ("height", "width")}  # what may differ between the extractors of buckets


class Buckets:
    """`sets` with training clips of `lengths` latent frames each.

    Raises ShardError for a set given twice, extractors that differ in more than the size of their latents, an identity
    that one set trains on and another holds out, and a clip that is in two sets.
    """

    def __init__(self, sets: Sequence[ShardSet], lengths: Sequence[int]) -> None:
        self.sets, self.lengths = tuple(sets), tuple(lengths)
        for number, opened in enumerate(self.sets):
            check_extractors_alike(self.sets[0], opened, FREE)
            for other in self.sets[:number]:
                if other.hash == opened.hash:
                    raise ShardError(f"data.shards: {opened.source}: the same clips as {other.source}: expected once")
        check_identities_apart(self.sets)
        check_clips_once(self.sets)

    @property
    def hash(self) -> str:
        """What the order of the clips follows from."""
        return joint_hash([opened.hash for opened in self.sets])

    @property
    def extractors(self) -> dict[str, Any]:
        """Those of the first set; the others have the same but for the size of their latents."""
        found: dict[str, Any] = self.sets[0].manifest["extractors"]
        return found

    def statistics(self) -> dict[str, Any]:
        """Mean and deviation per channel over the train splits of all sets together, of a manifest's form.

        Raises ShardError that names the set for one whose statistics are not of the widths of its extractors, or whose
        FLAME has no statistics, or no number of slots.
        """
        for opened in self.sets:
            origin, extractors = opened.source.label(MANIFEST_NAME), opened.manifest["extractors"]
            StreamStatistics.from_manifest(opened.manifest, origin).check_widths(extractors, origin)
        return pooled_statistics([(opened.manifest["statistics"], _weights(opened)) for opened in self.sets])

    def geometry(self) -> dict[str, Any]:
        """Pixels, latent shape and latent frames of the first set's clips, and of every bucket the edge of its pictures
        in pixels and the latent frames of its training clips."""
        manifest = self.sets[0].manifest
        video = manifest["extractors"]["video"]
        return {
            "pixel_size": manifest["pixel_size"],
            "latent": [video["channels"], video["height"], video["width"]],
            "frames": manifest["frames"],
            "buckets": [
                {"pixel_size": opened.manifest["pixel_size"], "frames": frames}
                for opened, frames in zip(self.sets, self.lengths, strict=True)
            ],
        }

    def tokens(self, patch: int) -> tuple[int, ...]:
        """Tokens of both towers in a training clip of each bucket."""
        sizes = (opened.manifest["extractors"]["video"] for opened in self.sets)
        frames = (video["height"] * video["width"] // patch**2 + STRUCT_TOKENS for video in sizes)
        return tuple(length * each for length, each in zip(self.lengths, frames, strict=True))

    def names(self) -> tuple[str, ...]:
        """A name for each bucket in logs, such as "256px-13f"; a number follows where two would be alike."""
        plain = [f"{e['pixel_size']}px-{e['frames']}f" for e in self.geometry()["buckets"]]
        twice = {name for name in plain if plain.count(name) > 1}
        return tuple(f"{name}-{i}" if name in twice else name for i, name in enumerate(plain))


def bucket_size(shards: str, reader: ShardReader, frames: int) -> BucketSize:
    """What the order needs to know of the split in `reader`, of the set with hash `shards`."""
    video = reader.manifest["extractors"]["video"]
    return BucketSize(shards, len(reader), frames * int(video["height"]) * int(video["width"]))


def _weights(opened: ShardSet) -> Mapping[str, tuple[int, ...]]:
    """How many values of a channel each row of a set's statistics is of: every clip of a set has equally many."""
    manifest = opened.manifest
    clips, frames, video = manifest["splits"]["train"]["samples"], manifest["frames"], manifest["extractors"]["video"]
    pixels = video["height"] * video["width"]
    found = {
        "video": (clips * pixels, clips * (frames - 1) * pixels),
        "struct": (clips * (frames * STRUCT_TOKENS - 3),),
        "audio": (clips * (frames * AUDIO_FRAMES - 6),),
    }
    if "flame" in manifest["extractors"]:
        slots = manifest["statistics"]["flame"].get("slots")  # that are valid, which no other number says
        if type(slots) is not int or not 0 <= slots <= found["struct"][0]:
            field = f"{opened.source.label(MANIFEST_NAME)}: statistics.flame.slots"
            raise ShardError(f"{field}: {shown(slots)}: expected a whole number, the valid slots of FLAME")
        found["flame"] = (slots,)
    return found
