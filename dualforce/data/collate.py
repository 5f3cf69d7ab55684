"""ClipSamples -> ClipBatch: crop in time, normalise, cut audio windows, stack; and padding at the end.

Legend as in dualforce/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from data_shards.schema import ClipSample, ShardError
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.data.windows import audio_windows
from dualforce.types import STRUCT_TOKENS, ClipBatch

FLAME_WIDTH = 56  # Cf of a set without FLAME: 50 expression + 6 pose coefficients (model reference, section 1)


def collate(
    samples: Sequence[ClipSample],
    refs: Sequence[ClipRef],
    statistics: StreamStatistics,
    frames: int,
    context: int,
    text_dim: int,
) -> ClipBatch:
    """Batch of the first `frames` latent frames of each clip: normalised, fp32, on the CPU, `valid` all True.

    A crop is a prefix, because the video codec gives latent frame 0 a role of its own; the audio of the last windows
    still looks `context` 50 Hz frames beyond it. A set without FLAME gives zeros that
    `flame_valid` switches off, one without text the null prompt: one token of zeros, [B,1,text_dim].
    Raises ShardError for a clip shorter than `frames`, a text width other than `text_dim`, or FLAME without statistics
    of it; ValueError for an empty or
    uneven batch.
    """
    if not samples or len(samples) != len(refs):
        raise ValueError(f"{len(samples)} samples, {len(refs)} refs: expected equal numbers of at least 1")
    for sample in samples:
        _check_fits(sample, frames, text_dim)
    windows = torch.stack([audio_windows(sample.audio, frames, context) for sample in samples])
    flame, flame_valid = _flame(samples, frames, statistics)
    return ClipBatch(
        video=statistics.normalise_clips([sample.video[:frames] for sample in samples]),
        struct=statistics.normalise_struct(torch.stack([sample.struct[:frames] for sample in samples])),
        audio=statistics.normalise_audio(windows),
        flame=flame,
        flame_valid=flame_valid,
        voiced=torch.stack([sample.voiced[:frames] for sample in samples]),
        reference=statistics.normalise_reference(torch.stack([sample.reference for sample in samples])),
        text=_text(samples, text_dim),
        valid=torch.ones(len(samples), frames, dtype=torch.bool, device="cpu"),
        keys=tuple(sample.key for sample in samples),
        position=tuple((ref.epoch, ref.position) for ref in refs),
    )


def pad_frames(batch: ClipBatch, multiple: int) -> ClipBatch:
    """Append frames of zeros until F is a multiple of `multiple`; False there in valid, voiced and flame_valid.

    Under a causal mask no real frame sees them (crops end at a whole chunk), so outputs, losses and gradients stay.
    """
    if multiple < 1:
        raise ValueError(f"multiple {multiple}: expected at least 1")
    missing = -batch.valid.shape[1] % multiple
    if not missing:
        return batch

    def padded(x: Tensor) -> Tensor:
        return pad(x, (0, 0) * (x.ndim - 2) + (0, missing))

    return batch._replace(
        video=padded(batch.video),
        struct=padded(batch.struct),
        audio=padded(batch.audio),
        flame=padded(batch.flame),
        flame_valid=padded(batch.flame_valid),
        voiced=padded(batch.voiced),
        valid=padded(batch.valid),
    )


def _check_fits(sample: ClipSample, frames: int, text_dim: int) -> None:
    if not 1 <= frames <= sample.frames:
        raise ShardError(
            f"sample {sample.key!r}: video: {sample.frames} latent frames: expected at least data.frames = {frames}"
        )
    if sample.text is not None and sample.text.shape[1] != text_dim:
        raise ShardError(
            f"sample {sample.key!r}: text: width {sample.text.shape[1]}: expected text_dim = {text_dim} of the model"
        )


def _flame(samples: Sequence[ClipSample], frames: int, statistics: StreamStatistics) -> tuple[Tensor, Tensor]:
    given = [sample.flame for sample in samples if sample.flame is not None]
    valid = [sample.flame_valid for sample in samples if sample.flame_valid is not None]
    if not given:
        shape = (len(samples), frames, STRUCT_TOKENS)
        return (
            torch.zeros(*shape, FLAME_WIDTH, dtype=torch.float32, device="cpu"),
            torch.zeros(shape, dtype=torch.bool, device="cpu"),
        )
    if len(given) != len(samples) or len(valid) != len(samples):
        raise ShardError(f"flame: {len(given)} of {len(samples)} samples have it: expected all or none")
    stacked = torch.stack([x[:frames] for x in given])
    return statistics.normalise_flame(stacked), torch.stack([x[:frames] for x in valid])


def _text(samples: Sequence[ClipSample], text_dim: int) -> Tensor:
    given = [sample.text for sample in samples if sample.text is not None]
    if not given:
        return torch.zeros(len(samples), 1, text_dim, dtype=torch.float32, device="cpu")
    lengths = sorted({len(text) for text in given})
    if len(given) != len(samples) or len(lengths) > 1:
        raise ShardError(
            f"text: {len(given)} of {len(samples)} samples, token counts {lengths}: "
            "expected one length in all samples, or no text"
        )
    return torch.stack(given).float()
