"""Video, sound and image files through PyAV: the one file that imports `av`.

Clock: time zero of a video file is the presentation time of its first video frame. Pixel frame k is the picture on
screen k / 25 s later, whatever the file's own frame rate, and sound sample n is heard n / 16000 s after the same zero.
Pictures come out upright (rotation flag applied) with square pixels, as uint8 RGB.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dualforce.codecs.media_clock import ClockError, PlacedSound, Timed, pixel_frames_shown, place_sound
from dualforce.codecs.protocols import Pixels, Wave
from dualforce.types import FPS, SAMPLE_RATE

MAX_PIXELS = 2**26  # of a picture: twice 8K. More is refused before memory is taken for it
# Kinds of files that are read. All hold what they show: playlists and lists of other files, which FFmpeg opens too
# (hls, concat, dash, sdp ...), would let a file name what else is read.
READ_FORMATS = (
    "3g2,3gp,aac,ac3,aiff,asf,avi,bmp_pipe,eac3,flac,flv,gif,image2,ivf,jpeg_pipe,m4a,matroska,mj2,mov,mp3,mp4,mpeg,"
    "mpegts,mpegvideo,ogg,png_pipe,w64,wav,webm,webp_pipe"
)
MAX_JITTER = Fraction(1, 50)  # seconds a sound block may lie off the running clock before it counts as a hole


class MediaError(ValueError):
    """A media file that cannot be read or written: `path: cause`."""

    def __init__(self, path: Path | str, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.cause = cause


@dataclass(frozen=True)
class MediaInfo:
    """What the head of a video file says. `zero` is the presentation time of the first picture, in seconds."""

    width: int
    height: int
    zero: Fraction
    rate: float
    codec: str
    sound: bool


@dataclass(frozen=True)
class Video:
    """Pictures [P,H,W,3] uint8 at 25 frames a second and the sound on the same clock (None without a sound stream)."""

    frames: Pixels
    sound: PlacedSound | None


def probe(path: Path) -> MediaInfo:
    """Size, start and streams of a video file, by decoding its first picture. Raises MediaError."""
    with opened(path) as container:
        stream = _stream(container, "video", path)
        for frame in container.decode(stream):
            width, height = _display_size(frame, stream, None)
            if _quarter_turns(frame) % 2:
                width, height = height, width
            return MediaInfo(
                width=width,
                height=height,
                zero=_time(frame) or Fraction(0),
                rate=float(stream.average_rate or FPS),
                codec=str(stream.codec_context.name),
                sound=bool(container.streams.audio),
            )
    raise MediaError(path, "no picture could be decoded")


def iter_frames(
    path: Path, *, max_side: int | None = None, step: int = 1, last: bool = False
) -> Iterator[tuple[int, Pixels]]:
    """Yield (k, picture [H,W,3] uint8) for pixel frames k = 0, step, 2 step, ... at 25 frames a second.

    Pixel frame k is the source picture on screen at k / 25 s after the first one. `max_side` shrinks larger pictures;
    `last` adds the video's final pixel frame. One picture is held at a time. Raises MediaError.
    """
    with opened(path) as container:
        stream = _stream(container, "video", path)
        size: tuple[int, int] | None = None
        final: tuple[int, Any] | None = None
        for frame, indices in _on_clock(container.decode(stream), stream):
            size = size or _display_size(frame, stream, max_side)
            if indices:
                final = (indices[-1], frame)
            wanted = [k for k in indices if k % step == 0]
            if wanted:
                picture = _upright(frame, size)
                for k in wanted:
                    yield k, picture
        if size is None or final is None:
            raise MediaError(path, "no picture could be decoded")
        if last and final[0] % step:
            yield final[0], _upright(final[1], size)


def read_video(path: Path, *, max_side: int | None = None, start: int = 0, stop: int | None = None) -> Video:
    """Pixel frames [start, stop) of a video and its sound cut to the same span.

    Memory grows with the span asked for; use `iter_frames` for long files. Raises MediaError.
    """
    frames = [picture for _, picture in itertools.islice(iter_frames(path, max_side=max_side), start, stop)]
    if not frames:
        raise MediaError(path, f"frames {start}..{stop}: the video has no such frames")
    sound = read_sound(path, probe(path).zero)
    if sound is None:
        return Video(np.stack(frames), None)
    samples = SAMPLE_RATE // FPS
    wave = sound.wave[start * samples : (start + len(frames)) * samples]
    return Video(np.stack(frames), PlacedSound(wave, max(0.0, sound.start - start / FPS), sound.gap))


def read_sound(path: Path, zero: Fraction | None = None) -> PlacedSound | None:
    """The sound of a file as 16 kHz mono from `zero` (file time in seconds; None: from its own first sample).

    Blocks are placed by their own timestamps, so a hole stays where it is. None without sound. Raises MediaError.
    """
    with opened(path) as container:
        if not container.streams.audio:
            return None
        blocks = _sound_blocks(container, container.streams.best("audio"))
    if not blocks:
        return None
    return place_sound(blocks, zero)


def read_audio(path: Path) -> Wave:
    """Sound of any media file as float32 [N], 16 kHz mono, from its first sample. Raises MediaError without sound."""
    sound = read_sound(path)
    if sound is None or not len(sound.wave):
        raise MediaError(path, "no sound stream")
    return sound.wave


def read_image(path: Path) -> Pixels:
    """The first picture of an image or video file, upright, [H,W,3] uint8. Raises MediaError."""
    return next(iter_frames(path))[1]


def duration(path: Path) -> float | None:
    """Length in seconds that the head of a media file states; None where it states none. Raises MediaError."""
    with opened(path) as container:
        return None if container.duration is None else container.duration / 1_000_000


def encode_jpeg(picture: Pixels) -> bytes:
    """A picture [H,W,3] uint8 as JPEG, for people to look at."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuvj420p")
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuvj420p"
    encoder.time_base = Fraction(1, FPS)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def write_video(path: Path, frames: Iterable[Pixels], wave: Wave | None, *, crf: int = 18) -> int:
    """Write an mp4 (H.264 yuv420p at 25 frames a second; AAC mono at 16 kHz when `wave` is given).

    `frames` yields uint8 [H,W,3] with even H and W and may be a generator: pictures are encoded as they come. The file
    appears under its name only when it is complete. Returns the number of pictures. Raises MediaError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with opened(partial, "w", name=path) as container:
            count = _encode(container, path, iter(frames), wave, crf)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


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
    except ClockError as error:
        raise MediaError(name or path, str(error)) from error
    except (av.FFmpegError, OSError, EOFError) as error:
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(name or path, f"cannot {'write' if mode == 'w' else 'decode'}: {cause}") from error


def _container(path: Path, mode: Literal["r", "w"]) -> Any:
    import av

    # "file:" because FFmpeg takes a name like "concat:x.mp4" or "pipe:0" for a protocol. No pattern of names, either.
    name = f"file:{path}"
    if mode == "w":
        return av.open(name, "w", format="mp4")
    return av.open(name, options={"format_whitelist": READ_FORMATS, "pattern_type": "none"})


def _stream(container: Any, kind: str, path: Path) -> Any:
    stream = container.streams.best(kind)
    if stream is None:
        raise MediaError(path, f"no {kind} stream")
    if kind == "video":
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _time(frame: Any) -> Fraction | None:
    """Presentation time in seconds; None where the file gives none."""
    return None if frame.pts is None else frame.pts * Fraction(frame.time_base)


def _length(frame: Any) -> Fraction | None:
    return frame.duration * Fraction(frame.time_base) if frame.duration else None


def _on_clock(frames: Iterable[Any], stream: Any) -> Iterator[tuple[Any, range]]:
    """Pair each decoded frame with the pixel frames during which it is on screen."""
    pictures = (Timed(frame, _time(frame), _length(frame)) for frame in frames)
    interval = 1 / Fraction(stream.average_rate or FPS)
    return pixel_frames_shown(pictures, interval, Fraction(stream.time_base))


def _display_size(frame: Any, stream: Any, max_side: int | None) -> tuple[int, int]:
    """(width, height) with square pixels, before rotation, shrunk to `max_side`."""
    ratio = Fraction(stream.sample_aspect_ratio or 1)
    width, height = Fraction(frame.width) * (ratio if ratio > 0 else 1), Fraction(frame.height)
    shrink = min(Fraction(1), Fraction(max_side) / max(width, height)) if max_side else Fraction(1)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _quarter_turns(frame: Any) -> int:
    return round(frame.rotation / 90) % 4


def _upright(frame: Any, size: tuple[int, int]) -> Pixels:
    """RGB picture of a decoded frame at `size` (before rotation), turned upright."""
    method = "AREA" if (frame.width, frame.height) != size else None
    picture = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation=method).to_ndarray()
    turns = _quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _sound_blocks(container: Any, stream: Any) -> list[tuple[Fraction, Wave]]:
    """Runs of sound without a hole: (file time of the first sample, 16 kHz mono samples)."""
    blocks: list[tuple[Fraction, list[Wave]]] = []
    mixer: _Mixer | None = None
    expected = Fraction(0)
    for frame in container.decode(stream):
        stamp = _time(frame)
        time = expected if stamp is None else stamp
        if mixer is None or abs(time - expected) > MAX_JITTER or not mixer.fits(frame):
            if mixer is not None:
                blocks[-1][1].extend(mixer.mix(None))
            mixer = _Mixer(frame)
            blocks.append((time, []))
            expected = time
        expected += Fraction(frame.samples, frame.sample_rate)
        blocks[-1][1].extend(mixer.mix(frame))
    if mixer is not None:
        blocks[-1][1].extend(mixer.mix(None))
    return [(time, np.concatenate(parts)) for time, parts in blocks if parts]


class _Mixer:
    """Resamples sound of one kind to 16 kHz mono: the mean of its channels, weighted as FFmpeg does.

    FFmpeg's own weights for float sound add up to more than 1 (1.41 for stereo, 3.41 for 5.1), so that a voice in all
    channels would be louder the more of them there are, and beyond full scale. They are measured and divided out.
    """

    def __init__(self, frame: Any) -> None:
        import av

        self._kind = _sound_kind(frame)
        self._resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        ones = np.ones((1, 64 * frame.layout.nb_channels), np.float32)
        probe = av.AudioFrame.from_ndarray(ones, "flt", frame.layout.name)
        probe.sample_rate = SAMPLE_RATE
        self._sum = float(av.AudioResampler("flt", "mono", SAMPLE_RATE).resample(probe)[0].to_ndarray()[0, 0])

    def fits(self, frame: Any) -> bool:
        """Whether a frame is of the kind that this mixer was made for."""
        return self._kind == _sound_kind(frame)

    def mix(self, frame: Any | None) -> list[Wave]:
        """What comes out for a frame; None: what is left at the end."""
        return [out.to_ndarray()[0] / np.float32(self._sum) for out in self._resampler.resample(frame)]


def _sound_kind(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _encode(container: Any, path: Path, frames: Iterator[Pixels], wave: Wave | None, crf: int) -> int:
    import av

    first = next(frames, None)
    if first is None:
        raise MediaError(path, "no pictures to write")
    height, width = _checked(first, None, path).shape[:2]
    video = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "medium"})
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    audio = None
    if wave is not None:
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
    count = heard = 0
    picture: Pixels | None = first
    while picture is not None:
        frame = av.VideoFrame.from_ndarray(_checked(picture, (height, width), path), format="rgb24")
        frame.pts, frame.time_base = count, Fraction(1, FPS)
        container.mux(video.encode(frame))
        count += 1
        if audio is not None and wave is not None:
            heard = _encode_sound(container, audio, wave, heard, count * SAMPLE_RATE // FPS)
        picture = next(frames, None)
    if audio is not None and wave is not None:
        _encode_sound(container, audio, wave, heard, len(wave))
        container.mux(audio.encode(None))
    container.mux(video.encode(None))
    return count


def _encode_sound(container: Any, stream: Any, wave: Wave, start: int, stop: int) -> int:
    """Encode samples [start, stop) of `wave`, as far as it goes; returns where it stopped."""
    import av

    stop = min(stop, len(wave))
    if stop > start:
        block = np.ascontiguousarray(wave[None, start:stop], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame))
    return max(start, stop)


def _checked(picture: Pixels, size: tuple[int, int] | None, path: Path) -> Pixels:
    """The picture, contiguous; raises MediaError unless it is uint8 [H,W,3] with even sides, `size` if given."""
    height, width, colours = picture.shape if picture.ndim == 3 else (1, 1, 0)
    right = picture.dtype == np.uint8 and colours == 3 and height % 2 == width % 2 == 0
    if not right or (size is not None and (height, width) != size):
        wanted = f"{size[0]}x{size[1]}" if size else "even height and width"
        raise MediaError(path, f"picture {picture.shape} {picture.dtype}: expected uint8 [H,W,3], {wanted}")
    return np.ascontiguousarray(picture)
