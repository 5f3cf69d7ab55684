"""Opening media files, so that nothing but the file named is read, and every fault is one line that names it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from dualforce.codecs.media.colour_tags import ColourError
from dualforce.codecs.media.interlaced import FieldsError
from dualforce.codecs.media_clock import ClockError

MAX_PIXELS = 2**26  # of a picture: twice 8K. More is refused before memory is taken for it
MAX_THREADS = 16
DECODING_BYTES = 2**27  # of pictures that are decoded at once: 21 of 1080p, 5 of 4K, one of 8K
# Kinds of files that are read. All hold what they show: playlists and lists of other files, which FFmpeg opens too
# (hls, concat, dash, sdp ...), would let a file name what else is read.
READ_FORMATS = (
    "3g2,3gp,aac,ac3,aiff,asf,avi,bmp_pipe,eac3,flac,flv,gif,image2,ivf,jpeg_pipe,m4a,matroska,mj2,mov,mp3,mp4,mpeg,"
    "mpegts,mpegvideo,ogg,png_pipe,w64,wav,webm,webp_pipe"
)


class MediaError(ValueError):
    """A media file that cannot be read or written: `path: cause`."""

    def __init__(self, path: Path | str, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.cause = cause


@contextlib.contextmanager
def opened(path: Path, mode: Literal["r", "w"] = "r", name: Path | None = None) -> Iterator[Any]:
    """Container of `path`; every decoder or system error inside becomes a MediaError naming the file."""
    try:
        import av
    except ImportError as error:
        raise MediaError(name or path, "PyAV is not installed: pip install 'dualforce[data]'") from error
    try:
        with _container(path, mode) as container:
            yield container
    except MediaError:
        raise
    except (ClockError, ColourError, FieldsError) as error:
        raise MediaError(name or path, str(error)) from error
    except (av.FFmpegError, OSError, EOFError) as error:
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(name or path, f"cannot {'write' if mode == 'w' else 'decode'}: {cause}") from error


def duration(path: Path) -> float | None:
    """Length in seconds that the head of a media file states; None where it states none. Raises MediaError."""
    with opened(path) as container:
        return None if container.duration is None else container.duration / 1_000_000


def stream_of(container: Any, kind: str, path: Path) -> Any:
    """The main stream of a kind, "video" or "audio", set up for decoding. Raises MediaError without one."""
    stream = container.streams.best(kind)
    if stream is None:
        raise MediaError(path, f"no {kind} stream")
    if kind == "video":
        threads = _threads(stream.codec_context.width * stream.codec_context.height)
        stream.thread_type = "AUTO" if threads > 1 else "SLICE"  # slices of one picture need no room
        stream.codec_context.thread_count = threads
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _threads(pixels: int) -> int:
    """Pictures that are decoded at once: each holds some 3 bytes a pixel, at 10 bits, beside those that others refer
    to."""
    return max(1, min(MAX_THREADS, os.cpu_count() or 1, DECODING_BYTES // max(1, 3 * pixels)))


def time_of(frame: Any) -> Fraction | None:
    """Presentation time in seconds; None where the file gives none."""
    return None if frame.pts is None else frame.pts * Fraction(frame.time_base)


def _container(path: Path, mode: Literal["r", "w"]) -> Any:
    import av

    # "file:" because FFmpeg takes a name like "concat:x.mp4" or "pipe:0" for a protocol. No pattern of names, either.
    name = f"file:{path}"
    if mode == "w":
        return av.open(name, "w", format="mp4")
    return av.open(name, options={"format_whitelist": READ_FORMATS, "pattern_type": "none"})
