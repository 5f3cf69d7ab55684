"""Training batches from the same tars, by the project's reader and by plain webdataset: what a trainer waits for.

Legend: F latent frames of a clip, B clips of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.reader import ShardReader, ShardSet
from dualforce.data.collate import collate
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.data.windows import audio_windows
from dualforce.types import AUDIO_FRAMES, ClipBatch

CONTEXT = 2  # 50 Hz frames of audio on each side of a window
Clips = Iterator[dict[str, Any]]


def ours(
    reader: ShardReader, statistics: StreamStatistics, order: Sequence[int], frames: int, size: int
) -> Iterator[ClipBatch]:
    """Batches of `size` clips in `order`, as the trainer makes them."""
    text_dim = reader.manifest["extractors"].get("text", {}).get("width", 1)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        samples = [reader.read(index, frames, -(-CONTEXT // AUDIO_FRAMES)) for index in part]
        refs = [ClipRef(0, start + number, index) for number, index in enumerate(part)]
        yield collate(samples, refs, statistics, frames, CONTEXT, text_dim)


def theirs(clips: Clips, statistics: StreamStatistics, frames: int, size: int) -> Iterator[dict[str, Tensor]]:
    """The same tensors by name: whole clips stacked and normalised by the formula, as is usual."""
    waiting: list[dict[str, Any]] = []
    for clip in clips:
        waiting.append(clip)
        if len(waiting) == size:
            yield _stacked(waiting, statistics, frames)
            waiting = []
    if waiting:
        yield _stacked(waiting, statistics, frames)


def _stacked(clips: list[dict[str, Any]], statistics: StreamStatistics, frames: int) -> dict[str, Tensor]:
    normalise: dict[str, Callable[[Tensor], Tensor]] = {
        "video": statistics.normalise_video,
        "struct": statistics.normalise_struct,
        "reference": statistics.normalise_reference,
        "audio": statistics.normalise_audio,
        "flame": statistics.normalise_flame,
        "text": Tensor.float,
    }
    found = {}
    for name, value in clips[0].items():
        if isinstance(value, Tensor):
            parts = [clip[name] for clip in clips]
            if name == "audio":
                parts = [audio_windows(part, frames, CONTEXT) for part in parts]
            elif name not in ("reference", "text"):
                parts = [part[:frames] for part in parts]
            stacked = torch.stack(parts)
            found[name] = normalise[name](stacked) if name in normalise else stacked
    return found


def statistics_of(shards: Path) -> StreamStatistics:
    """Those of the set's train split."""
    return StreamStatistics.from_manifest(ShardSet.open(shards).manifest)
