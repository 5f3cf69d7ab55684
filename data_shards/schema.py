"""What one training clip is and what makes it valid.

Legend: F latent frames, C,H,W latent channels, height and width, Q = 4 structure tokens and A = 8 audio frames (50 Hz)
per latent frame, Cs/Ca/Cf/Ct widths of structure, audio, FLAME and text, E text tokens.

Latent frame 0 covers one pixel frame, every later one four. Frame 0 of the structure therefore holds its one pixel
frame Q times, and frame 0 of the audio holds 50 Hz frames 0,0,0,0,0,0,0,1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHARD_VERSION = 2
RECORD_VERSION = 1  # of the JSON member of a clip, which version 2 of the set left as it was: the tars did not change
FPS = 25
AUDIO_HZ = 50
STRUCT_TOKENS = 4
AUDIO_FRAMES = 8
PIXELS_PER_LATENT = 8  # edge of the square of pixels that one latent position stands for
MAX_KEY = 80  # a plain (USTAR) tar stores 100 characters, and ".safetensors" takes 12
MAX_SHOWN = 240  # characters of a value in a message
MAX_CLIP_BYTES = 2**26  # of the safetensors member: what a stranger's index can make a reader allocate
MAX_RECORD_BYTES = 2**22  # of the JSON member
SPLITS = ("train", "validation")

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LATENT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_AUDIO_TYPES = (torch.float16, torch.float32)
_OPTIONAL = ("flame", "text")
_WIDTHS = {
    "video": ("channels", "height", "width"),
    "motion": ("width",),
    "audio": ("width",),
    "flame": ("width",),
    "text": ("width",),
}


class ShardError(ValueError):
    """Shards or a clip that cannot be used. The message is one line: where, sample, field, value, expectation."""


@dataclass(frozen=True, eq=False)
class ClipSample:
    """One clip on the latent-frame clock; no stream is normalised. `validate` states the rules."""

    key: str  # unique in the set: letters, digits, "_" and "-"
    identity: str  # source video (or person); an identity lives in one split only
    video: Tensor  # [F,C,H,W] float16 | bfloat16 | float32 latents
    reference: Tensor  # [C,H,W] of video's dtype: the reference image coded alone, as latent frame 0 is
    struct: Tensor  # [F,4,Cs] float32
    audio: Tensor  # [F,8,Ca] float16 | float32
    voiced: Tensor  # [F] bool: speech is heard in the frame
    flame: Tensor | None  # [F,4,Cf] float32
    flame_valid: Tensor | None  # [F,4] bool
    text: Tensor | None  # [E,Ct] float16 | bfloat16 | float32
    meta: dict[str, Any]  # JSON: source, first pixel frame, crop track, checks, licence ...

    @property
    def frames(self) -> int:
        """F, the number of latent frames."""
        return int(self.video.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors and present, by name: the members of the safetensors file."""
        named = {name: getattr(self, name) for name in TENSOR_FIELDS}
        return {name: value for name, value in named.items() if value is not None}


TENSOR_FIELDS = ("video", "reference", "struct", "audio", "voiced", "flame", "flame_valid", "text")
TIME_FIELDS = ("video", "struct", "audio", "voiced", "flame", "flame_valid")  # the first dimension is F
OPTIONAL_FIELDS = ("flame", "flame_valid", "text")


def fail(origin: str, sample: str, field: str, value: object, expected: str) -> ShardError:
    """The one form of message for a fault in a clip, `origin` being a file or the stage that made the clip."""
    return ShardError(f"{origin}: sample {shown(sample)}: {shown(field, raw=True)}: {shown(value, raw=True)}: "
                      f"expected {expected}")  # fmt: skip


def shown(value: object, raw: bool = False) -> str:
    """`value` for a message of one line: short, printable, and safe for values of any size and depth.

    `raw` leaves the quotes away from text that is printable.
    """
    if isinstance(value, Mapping | list | tuple) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = value if raw and isinstance(value, str) and value.isprintable() else repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of more than 4300 digits
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def check_key(key: str, origin: str) -> None:
    """Raise ShardError unless `key` can name members of a tar on any system."""
    if not isinstance(key, str) or not _KEY.fullmatch(key) or len(key) > MAX_KEY:
        raise fail(origin, str(key)[:120], "key", repr(key)[:120], f"1 to {MAX_KEY} characters of A-Z a-z 0-9 _ -")


def check_extractors(extractors: Mapping[str, Mapping[str, Any]], origin: str) -> None:
    """Raise ShardError unless the table names a tag and the widths of every stream (flame and text are optional)."""

    def wrong(key: str, value: object, expected: str) -> ShardError:
        return ShardError(f"{origin}: extractors.{shown(key, raw=True)}: {shown(value)}: expected {expected}")

    if not isinstance(extractors, Mapping):
        raise ShardError(f"{origin}: extractors: {shown(extractors)}: expected an object")
    for stream in (*_WIDTHS, *extractors):
        if stream not in _WIDTHS:
            raise wrong(stream, extractors[stream], f"one of {', '.join(_WIDTHS)}")
        if stream not in extractors:
            if stream not in _OPTIONAL:
                raise wrong(stream, None, "a tag and widths")
            continue
        entry = extractors[stream]
        if not isinstance(entry, Mapping):
            raise wrong(stream, entry, "an object")
        if not isinstance(entry.get("tag"), str) or not 1 <= len(entry["tag"]) <= MAX_SHOWN:
            raise wrong(
                f"{stream}.tag", entry.get("tag"), f"the tag of the extractor, of at most {MAX_SHOWN} characters"
            )
        for width in _WIDTHS[stream]:
            if type(entry.get(width)) is not int or not 1 <= entry[width] <= MAX_CLIP_BYTES:
                raise wrong(f"{stream}.{width}", entry.get(width), "a whole number of at least 1 that fits a clip")
    if extractors["audio"].get("hz", AUDIO_HZ) != AUDIO_HZ:
        raise wrong("audio.hz", extractors["audio"]["hz"], str(AUDIO_HZ))
    names = extractors["motion"].get("names")
    if names is not None and not isinstance(names, list | tuple):
        raise wrong("motion.names", names, "a list of names")
    if names is not None and len(names) != extractors["motion"]["width"]:
        raise wrong("motion.names", f"{len(names)} names", f"{extractors['motion']['width']}, the motion width")


def tags_of(extractors: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Tag of every stream; two tables with equal tags hold comparable numbers."""
    return {stream: str(entry["tag"]) for stream, entry in sorted(extractors.items())}


def validate(sample: ClipSample, origin: str, extractors: Mapping[str, Mapping[str, Any]], *, beyond: int = 0) -> None:
    """Raise ShardError unless `sample` keeps the contract with the widths of the `extractors` table.

    Checked: key and identity, presence of optional streams, shapes, dtypes, equal F, finite values, and the repetition
    in latent frame 0 (module docstring), which catches a track that was not put on the latent-frame clock.
    `origin` names the shard or source in the message. The prefix of a clip is valid where the clip is; `beyond` is the
    number of latent frames that its audio has more than the other streams.
    """
    check_key(sample.key, origin)
    if not isinstance(sample.identity, str) or not sample.identity:
        raise fail(origin, sample.key, "identity", repr(sample.identity), "a name of the source")
    _check_presence(sample, origin, extractors)
    shapes = _expected_shapes(sample, origin, extractors, beyond)
    for name, tensor in sample.tensors().items():
        types = _expected_types(sample, name)
        if tensor.dtype not in types:
            expected = " or ".join(str(kind).removeprefix("torch.") for kind in types)
            raise fail(origin, sample.key, name, f"dtype {str(tensor.dtype).removeprefix('torch.')}", expected)
        if tuple(tensor.shape) != shapes[name]:
            raise fail(origin, sample.key, name, f"shape {list(tensor.shape)}", str(list(shapes[name])))
        _check_finite(sample, name, tensor, origin)
    _check_first_frame(sample, origin)


def _check_presence(sample: ClipSample, origin: str, extractors: Mapping[str, Mapping[str, Any]]) -> None:
    for name, stream in (("flame", "flame"), ("flame_valid", "flame"), ("text", "text")):
        present, listed = getattr(sample, name) is not None, stream in extractors
        if listed and not present:
            raise fail(origin, sample.key, name, "absent", f"a tensor, as extractors lists {stream!r}")
        if present and not listed:
            raise fail(origin, sample.key, name, "present", f"no such tensor, as extractors has no {stream!r}")


def _expected_shapes(
    sample: ClipSample, origin: str, extractors: Mapping[str, Mapping[str, Any]], beyond: int
) -> dict[str, tuple[int, ...]]:
    if sample.video.ndim != 4 or sample.video.shape[0] < 1:
        raise fail(origin, sample.key, "video", f"shape {list(sample.video.shape)}", "[F,C,H,W] with F of at least 1")
    frames = sample.frames
    latent = tuple(int(extractors["video"][name]) for name in ("channels", "height", "width"))
    shapes: dict[str, tuple[int, ...]] = {
        "video": (frames, *latent),
        "reference": latent,
        "struct": (frames, STRUCT_TOKENS, int(extractors["motion"]["width"])),
        "audio": (frames + beyond, AUDIO_FRAMES, int(extractors["audio"]["width"])),
        "voiced": (frames,),
        "flame_valid": (frames, STRUCT_TOKENS),
    }
    if sample.flame is not None:
        shapes["flame"] = (frames, STRUCT_TOKENS, int(extractors["flame"]["width"]))
    if sample.text is not None:
        if sample.text.ndim != 2 or sample.text.shape[0] < 1:
            raise fail(origin, sample.key, "text", f"shape {list(sample.text.shape)}", "[E,Ct] with E of at least 1")
        shapes["text"] = (int(sample.text.shape[0]), int(extractors["text"]["width"]))
    return shapes


def _expected_types(sample: ClipSample, name: str) -> tuple[torch.dtype, ...]:
    if name == "reference":
        return (sample.video.dtype,)
    if name in ("video", "text"):
        return _LATENT_TYPES
    if name == "audio":
        return _AUDIO_TYPES
    return (torch.float32,) if name in ("struct", "flame") else (torch.bool,)


def _check_finite(sample: ClipSample, name: str, tensor: Tensor, origin: str) -> None:
    if not tensor.is_floating_point():
        # A byte other than 0 and 1 in a bool tensor is neither true nor false to the operations that meet it.
        if tensor.dtype == torch.bool and int(tensor.view(torch.uint8).max()) > 1:
            raise fail(origin, sample.key, name, f"byte {int(tensor.view(torch.uint8).max())}", "0 or 1, as bool")
        return
    # The extremes are infinite or NaN if any value is; on the CPU they cost a tenth of isfinite over all values.
    low, high = tensor.aminmax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = ~torch.isfinite(tensor)
    first = [int(i) for i in bad.nonzero()[0]]
    value = f"{int(bad.sum())} values that are not finite, the first at {first}"
    raise fail(origin, sample.key, name, value, "finite numbers")


def _check_first_frame(sample: ClipSample, origin: str) -> None:
    for name, repeated in (("struct", STRUCT_TOKENS), ("flame", STRUCT_TOKENS), ("audio", AUDIO_FRAMES - 1)):
        tensor: Tensor | None = getattr(sample, name)
        if tensor is not None and not torch.equal(tensor[0, :repeated], tensor[0, :1].expand(repeated, -1)):
            raise fail(
                origin, sample.key, name, f"slots 0 to {repeated - 1} of frame 0 differ", "one value, repeated (clock)"
            )
