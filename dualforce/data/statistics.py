"""Normalisation of the streams by the statistics of a shard set's train split.

Legend: F latent frames, C,H,W latent channels, height and width, Cs/Ca/Cf widths of structure, audio and FLAME.
Video has two rows of statistics: frame 0 (one pixel frame) and the other frames (four each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from data_shards.schema import ShardError
from dualforce.reused import empty

ABSOLUTE_FLOOR = 1e-3
RELATIVE_FLOOR = 1e-2
_STREAMS = ("video", "struct", "audio", "flame")
# Stream, its entry in a table of extractors, and the key of the width there.
_WIDTHS = (("video", "video", "channels"), ("struct", "motion", "width"), ("audio", "audio", "width"),
           ("flame", "flame", "width"))  # fmt: skip
_UPGRADE = " (a set made before they were kept gets them from: dualforce data upgrade OLD NEW)"


@dataclass(frozen=True, eq=False)
class StreamStatistics:
    """Mean and standard deviation per channel, fp32 on the CPU; deviations have their floor (`floored`)."""

    video_mean: Tensor  # [2,C]
    video_std: Tensor  # [2,C]
    struct_mean: Tensor  # [Cs]
    struct_std: Tensor  # [Cs]
    audio_mean: Tensor  # [Ca]
    audio_std: Tensor  # [Ca]
    flame_mean: Tensor | None = None  # [Cf]; of a set with FLAME
    flame_std: Tensor | None = None  # [Cf]

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], origin: str = "manifest.json") -> StreamStatistics:
        """From a shard manifest, or from any JSON object that has a `statistics` section or is one (`to_dict`).

        Those of FLAME may be absent, also where there is FLAME: only training needs them (`check_widths`).
        Raises ShardError naming `origin` and the key for an absent or wrong entry.
        """
        values = manifest.get("statistics", manifest)
        streams = [stream for stream in _STREAMS if stream != "flame" or "flame" in values]
        read: dict[str, Tensor] = {}
        for field in fields(cls):
            stream, _, kind = field.name.partition("_")
            if stream not in streams:
                continue
            key = f"{origin}: statistics.{stream}.{kind}"
            try:
                tensor = torch.tensor(values[stream][kind], dtype=torch.float32, device="cpu")
            except (KeyError, TypeError, ValueError) as error:
                raise ShardError(f"{key}: {type(error).__name__} {error}: expected a list of numbers") from None
            if tensor.ndim != (2 if stream == "video" else 1) or (stream == "video" and len(tensor) != 2):
                expected = "[2,C]" if stream == "video" else "[D]"
                raise ShardError(f"{key}: shape {list(tensor.shape)}: expected {expected}")
            if not torch.isfinite(tensor).all() or (kind == "std" and (tensor < 0).any()):
                bad = ~torch.isfinite(tensor) | ((tensor < 0) if kind == "std" else False)
                at = [int(i) for i in bad.nonzero()[0]]
                value = float(tensor[tuple(at)])
                raise ShardError(f"{key}{at}: {value}: expected finite numbers, deviations of at least 0")
            read[field.name] = floored(tensor) if kind == "std" else tensor
        for stream in streams:
            mean, std = read[f"{stream}_mean"], read[f"{stream}_std"]
            if mean.shape != std.shape:
                raise ShardError(
                    f"{origin}: statistics.{stream}: mean {list(mean.shape)}, std {list(std.shape)}: expected one shape"
                )
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the form of the manifest's `statistics`; `from_manifest` gives back the same numbers."""
        out: dict[str, Any] = {}
        for field in fields(self):
            stream, _, kind = field.name.partition("_")
            value: Tensor | None = getattr(self, field.name)
            if value is not None:
                out.setdefault(stream, {})[kind] = value.tolist()
        return out

    def normalise_video(self, x: Tensor, first_frame: int = 0) -> Tensor:
        """[..,F,C,H,W] -> the same in fp32, normalised; `first_frame` is the absolute latent frame of x's first."""
        mean, std = self._video_rows(x, first_frame)
        return (x.float() - mean) / std

    def normalise_clips(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips [F,C,H,W] from frame 0 on -> [B,F,C,H,W] fp32, each normalised as by `normalise_video`.

        Raises ValueError for clips of several shapes.
        """
        if len(shapes := {tuple(clip.shape) for clip in clips}) > 1:  # `copy_` would repeat a dimension of 1
            raise ValueError(f"clips of shapes {sorted(shapes)}: expected one shape")
        mean, std = self._video_rows(clips[0], 0)
        batch = empty((len(clips), *clips[0].shape))
        for clip, row in zip(clips, batch, strict=True):
            # A frame at a time, which stays in the processor's cache between the operations.
            for x, m, s, out in zip(clip, mean, std, row, strict=True):
                out.copy_(x).sub_(m).div_(s)
        return batch

    def denormalise_video(self, x: Tensor, first_frame: int = 0) -> Tensor:
        """Inverse of `normalise_video`, fp32."""
        mean, std = self._video_rows(x, first_frame)
        return x.float() * std + mean

    def normalise_reference(self, x: Tensor) -> Tensor:
        """[..,C,H,W], coded as frame 0 is -> the same in fp32, with the statistics of frame 0."""
        return self.normalise_video(x.unsqueeze(-4)).squeeze(-4)

    def normalise_struct(self, x: Tensor) -> Tensor:
        """[..,Cs] -> the same in fp32, normalised."""
        return (x.float() - self.struct_mean.to(x.device)) / self.struct_std.to(x.device)

    def denormalise_struct(self, x: Tensor) -> Tensor:
        """Inverse of `normalise_struct`, fp32."""
        return x.float() * self.struct_std.to(x.device) + self.struct_mean.to(x.device)

    def normalise_audio(self, x: Tensor) -> Tensor:
        """[..,Ca] -> the same in fp32, normalised."""
        return (x.float() - self.audio_mean.to(x.device)) / self.audio_std.to(x.device)

    def normalise_flame(self, x: Tensor) -> Tensor:
        """[..,Cf] -> the same in fp32, normalised. Raises ShardError without statistics of FLAME."""
        mean, std = self.flame_mean, self.flame_std
        if mean is None or std is None:
            raise ShardError(f"statistics.flame: absent: expected those of the clips' FLAME{_UPGRADE}")
        return (x.float() - mean.to(x.device)) / std.to(x.device)

    def check_widths(self, extractors: Mapping[str, Any], origin: str = "manifest.json") -> None:
        """Raise ShardError naming `origin` unless there are statistics of every stream of `extractors` that is
        normalised, of its width."""
        for stream, entry, width in _WIDTHS:
            if entry not in extractors:
                continue
            mean: Tensor | None = getattr(self, f"{stream}_mean")
            if mean is None:
                raise ShardError(f"{origin}: statistics.{stream}: absent: expected those of the clips' FLAME{_UPGRADE}")
            if mean.shape[-1] != extractors[entry][width]:
                expected = f"{extractors[entry][width]}, as extractors has it"
                raise ShardError(f"{origin}: statistics.{stream}: {mean.shape[-1]} channels: expected {expected}")

    def _video_rows(self, x: Tensor, first_frame: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every frame of `x`, each [F,C,1,1] on x's device."""
        if x.ndim < 4 or x.shape[-3] != self.video_mean.shape[1] or first_frame < 0:
            expected = f"[..,F,{self.video_mean.shape[1]},H,W] from frame 0 or later"
            raise ValueError(f"video of shape {list(x.shape)} from frame {first_frame}: expected {expected}")
        row = [0 if first_frame + frame == 0 else 1 for frame in range(x.shape[-4])]
        mean, std = self.video_mean[row], self.video_std[row]
        return mean[:, :, None, None].to(x.device), std[:, :, None, None].to(x.device)


def pooled_statistics(parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Sequence[int]]]]) -> dict[str, Any]:
    """Statistics of the union of several sets, each given as the `statistics` of its manifest and, by stream, how many
    values each row of them is of. One part comes back as it is.

    Mean and variance of a union: m = sum n_i m_i / n; v = sum n_i (v_i + (m_i - m)^2) / n, in fp64.
    """
    if len(parts) == 1:
        return dict(parts[0][0])
    found: dict[str, Any] = {}
    for stream in parts[0][1]:
        counts = torch.tensor([weights[stream] for _, weights in parts], dtype=torch.float64, device="cpu")
        mean, std = (
            torch.tensor([values[stream][kind] for values, _ in parts], dtype=torch.float64, device="cpu")
            for kind in ("mean", "std")
        )  # [parts,(rows,)D]
        # FLAME that is nowhere valid has no values, and any mean will do.
        share = counts / counts.sum(0) if counts.sum() else torch.full_like(counts, 1 / len(parts))
        share = share.view(len(parts), *([-1] if mean.ndim == 3 else []), 1)
        pooled = (share * mean).sum(0)
        variance = (share * (std.square() + (mean - pooled).square())).sum(0)
        found[stream] = {"mean": pooled.tolist(), "std": variance.sqrt().tolist()}
    return found


def floored(std: Tensor) -> Tensor:
    """Deviations [..,D] with a floor per row: max(1e-3, 1e-2 x the median of the row).

    A channel that hardly moves in the training clips carries rounding and detector noise. Divided by its own tiny
    deviation it would weigh as much in the loss as a channel that means something, and a clip in which it does move
    would give values in the thousands. The absolute part is below what can be seen or heard in any unit in use
    (degrees, blendshape weights, latents of pixels in [-1, 1], log energies); the relative part catches dead channels
    of streams with larger units. The median keeps a few large channels (angles in degrees beside offsets of a few
    hundredths) from lifting the floor of all. Applying the floor twice changes nothing.
    """
    median = std.median(dim=-1, keepdim=True).values
    return torch.maximum(std, (RELATIVE_FLOOR * median).clamp_min(ABSOLUTE_FLOOR))
