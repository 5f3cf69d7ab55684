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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARD_VERSION = 3
RECORD_VERSION = 1  # of the JSON member of a clip: later versions of the set left the tars as they were
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

KEY_CHARACTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LATENT_TYPES = ("float16", "bfloat16", "float32")
_TYPES = {"video": _LATENT_TYPES, "text": _LATENT_TYPES, "audio": ("float16", "float32"), "struct": ("float32",),
          "flame": ("float32",), "voiced": ("bool",), "flame_valid": ("bool",)}  # fmt: skip
REPEATED = {"struct": STRUCT_TOKENS, "flame": STRUCT_TOKENS, "audio": AUDIO_FRAMES - 1}  # equal slots of frame 0
# Whole numbers of the same size, with and without a sign, and which of them is infinity.
_INFINITY = {"float16": ("<i2", "<u2", 0x7C00), "bfloat16": ("<i2", "<u2", 0x7F80),
             "float32": ("<i4", "<u4", 0x7F800000)}  # fmt: skip
_OPTIONAL = ("flame", "text")
_WIDTHS = {
    "video": ("channels", "height", "width"),
    "motion": ("width",),
    "audio": ("width",),
    "flame": ("width",),
    "text": ("width",),
}


class ShardError(ValueError):
    """Shards or a clip that cannot be used. The message is one line: where, sample, field, value, expectation.

    Of a clip that was read from a set it also says, by themselves: `shard`, the name of the file (the tar, or that of
    its checksums), and `member`, what of the clip is wrong there: KEY.json, KEY.safetensors, "checksums" or a tensor;
    empty where the file is as a whole.
    """

    shard = ""
    member = ""


class MachineError(ShardError):
    """This machine cannot read at the moment (too many open files, no memory, a network disk that is gone). It says
    nothing about a clip, and must never lead to another clip in its place."""


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
    return at(f"{origin}: sample {shown(sample)}", field, value, expected)


def at(place: str, field: str, value: object, expected: str) -> ShardError:
    """The same for a fault at any place of a set."""
    error = ShardError(f"{place}: {shown(field, raw=True)}: {shown(value, raw=True)}: expected {expected}")
    error.member = field
    return error


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


def licence_of(meta: Mapping[str, Any]) -> str:
    """Licence of a clip, by its meta."""
    return str(meta.get("licence") or "not stated")


def validate(sample: ClipSample, origin: str, extractors: Mapping[str, Mapping[str, Any]], *, beyond: int = 0) -> None:
    """Raise ShardError unless `sample` keeps the contract with the widths of the `extractors` table.

    Checked: key and identity, and `check_form` and `check_values` of its tensors. `origin` names the shard or source in
    the message. The prefix of a clip is valid where the clip is; `beyond` is the number of latent frames that its audio
    has more than the other streams.
    """
    check_key(sample.key, origin)
    if not isinstance(sample.identity, str) or not sample.identity:
        raise fail(origin, sample.key, "identity", repr(sample.identity), "a name of the source")
    tensors = sample.tensors()
    forms = {name: Form(str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in tensors.items()}
    place = f"{origin}: sample {shown(sample.key)}"
    check_form(forms, place, extractors, beyond=beyond)
    check_values(tensors, place)


class Form(NamedTuple):
    """What a tensor is beside its values: the name of its dtype ("float16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def check_form(
    forms: Mapping[str, Form], place: str, extractors: Mapping[str, Mapping[str, Any]], *, beyond: int = 0
) -> None:
    """Raise ShardError unless these are the tensors of a clip: those that `extractors` lists, their dtypes and shapes
    of its widths, with equal F (`beyond` frames more of audio). `place` begins the message."""
    for name in TENSOR_FIELDS:
        stream = {"flame": "flame", "flame_valid": "flame", "text": "text"}.get(name)
        listed = stream is None or stream in extractors
        why = f", as extractors lists {stream!r}" if stream else " of every clip"
        if listed and name not in forms:
            raise at(place, name, "absent", f"a tensor{why}")
        if name in forms and not listed:
            raise at(place, name, "present", f"no such tensor, as extractors has no {stream!r}")
    shapes = _expected_shapes(forms, place, extractors, beyond)
    for name, form in forms.items():
        types = (forms["video"].dtype,) if name == "reference" else _TYPES[name]
        if form.dtype not in types:
            raise at(place, name, f"dtype {form.dtype}", " or ".join(types))
        if form.shape != shapes[name]:
            raise at(place, name, f"shape {list(form.shape)}", str(list(shapes[name])))


def _expected_shapes(
    forms: Mapping[str, Form], place: str, extractors: Mapping[str, Mapping[str, Any]], beyond: int
) -> dict[str, tuple[int, ...]]:
    video = forms["video"].shape
    if len(video) != 4 or video[0] < 1:
        raise at(place, "video", f"shape {list(video)}", "[F,C,H,W] with F of at least 1")
    frames = video[0]
    latent = tuple(int(extractors["video"][name]) for name in ("channels", "height", "width"))
    shapes: dict[str, tuple[int, ...]] = {
        "video": (frames, *latent),
        "reference": latent,
        "struct": (frames, STRUCT_TOKENS, int(extractors["motion"]["width"])),
        "audio": (frames + beyond, AUDIO_FRAMES, int(extractors["audio"]["width"])),
        "voiced": (frames,),
        "flame_valid": (frames, STRUCT_TOKENS),
    }
    if "flame" in forms:
        shapes["flame"] = (frames, STRUCT_TOKENS, int(extractors["flame"]["width"]))
    if "text" in forms:
        text = forms["text"].shape
        if len(text) != 2 or text[0] < 1:
            raise at(place, "text", f"shape {list(text)}", "[E,Ct] with E of at least 1")
        shapes["text"] = (text[0], int(extractors["text"]["width"]))
    return shapes


def check_values(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise ShardError unless all numbers are finite, bools are 0 or 1, and the slots that latent frame 0 repeats
    (module docstring) are equal, which catches a track that was not put on the latent-frame clock."""
    for name, tensor in tensors.items():
        _check_finite(name, tensor, place)
    for name, repeated in REPEATED.items():
        if name in tensors:
            first = tensors[name][0, :repeated].numpy(force=True)
            if not (first == first[:1]).all():
                raise at(place, name, f"slots 0 to {repeated - 1} of frame 0 differ", "one value, repeated (clock)")


def are_numbers(data: NDArray[np.uint8], dtype: str) -> bool:
    """Whether bytes that hold numbers of `dtype` (or bools) are all finite (or 0 and 1)."""
    if dtype == "bool":
        # Another byte in a bool tensor is neither true nor false to the operations that meet it.
        return bool(np.maximum.reduce(data) <= 1)
    # As whole numbers, infinity and NaN are the largest: of the positive floats with a sign, of all without one. This
    # takes half the time of the extremes as floats, a twentieth of isfinite.
    kind, plain, infinity = _INFINITY[dtype]
    signed, unsigned = data.view(kind), data.view(plain)
    largest, sign = np.maximum.reduce, 1 << (8 * signed.itemsize - 1)
    return bool(largest(signed) < infinity and largest(unsigned) < infinity + sign)


def _check_finite(name: str, tensor: Tensor, place: str) -> None:
    whole = tensor.detach().cpu().contiguous()
    if are_numbers(whole.view(-1).view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch.")):
        return
    if tensor.dtype == torch.bool:
        raise at(place, name, f"byte {int(whole.view(torch.uint8).max())}", "0 or 1, as bool")
    bad = ~torch.isfinite(tensor)
    first = [int(i) for i in bad.nonzero()[0]]
    value = f"{int(bad.sum())} values that are not finite, the first at {first}"
    raise at(place, name, value, "finite numbers")
