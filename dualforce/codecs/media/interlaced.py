"""Whole pictures of interlaced ones: FFmpeg's bwdif, one picture for each that comes, at its time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from dualforce.codecs.media_clock import Timed

METHOD = "bwdif"
# One picture for each, by the field order that it states; pictures that are not interlaced pass unchanged.
OPTIONS = "mode=send_frame:parity=auto:deint=interlaced"


class FieldsError(ValueError):
    """Fields that are pictures of their own; one line for the user."""


def check_whole(frame: Any, codec: str) -> None:
    """Raise FieldsError for a decoded picture of HEVC that is one field, half as high as what it shows.

    FFmpeg's decoder does not weave them, and sets the flag for no others (tried with every `pic_struct`, H.265 D.2.3).
    """
    if codec == "hevc" and frame.interlaced_frame:
        raise FieldsError("HEVC with each field as a picture of its own: expected whole pictures")


def progressive(pictures: Iterable[Timed[Any]]) -> Iterator[Timed[Any]]:
    """The decoded frames of one stream without combing (`Progressive`)."""
    work = Progressive()
    for picture in pictures:
        done = work.feed(picture)
        del picture  # so that it is not held here while the next one is decoded
        while done:
            yield done.pop(0)
    yield from work.rest()


class Progressive:
    """The decoded frames of one stream without combing, where they come one by one.

    Frames before the first interlaced one are handed through as they are; from there on, up to a change of size or
    format, each is held until the next one is known, which bwdif looks at.
    """

    def __init__(self) -> None:
        self._work: _Deinterlacer | None = None

    def feed(self, picture: Timed[Any]) -> list[Timed[Any]]:
        """What is done once this picture is known; none of it is held here any more."""
        done = []
        if self._work is not None and not self._work.fits(picture.item):
            done = self.rest()
        if self._work is None and picture.item.interlaced_frame:
            self._work = _Deinterlacer(picture.item)
        return [*done, picture] if self._work is None else [*done, *self._work.feed(picture)]

    def rest(self) -> list[Timed[Any]]:
        """What is left at the end."""
        work, self._work = self._work, None
        return [] if work is None else list(work.rest())


class _Deinterlacer:
    def __init__(self, frame: Any) -> None:
        from av.filter import Graph

        self._kind = _kind(frame)
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        self._graph.link_nodes(source, self._graph.add(METHOD, OPTIONS), self._graph.add("buffersink")).configure()
        self._times: deque[Timed[Any]] = deque()  # the filter's own times are not looked at: it has none for some

    def fits(self, frame: Any) -> bool:
        return self._kind == _kind(frame)

    def feed(self, picture: Timed[Any]) -> Iterator[Timed[Any]]:
        """What is done once this picture is known."""
        self._times.append(picture._replace(item=None))
        self._graph.push(picture.item)
        yield from self._done()

    def rest(self) -> Iterator[Timed[Any]]:
        """What is left at the end."""
        self._graph.push(None)
        yield from self._done()
        if self._times:
            raise RuntimeError(f"{METHOD}: {len(self._times)} pictures fewer than came: expected as many")

    def _done(self) -> Iterator[Timed[Any]]:
        import av

        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield self._times.popleft()._replace(item=frame)


def _kind(frame: Any) -> tuple[int, int, str, int]:
    return frame.width, frame.height, frame.format.name, frame.rotation
