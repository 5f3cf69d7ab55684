"""The real yt-dlp and ffmpeg, reading from a server on this machine: sections keep the times of their video."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.numbered_clip import number_in, number_place, numbered_clip, pictures_of

from dualforce.codecs.media import probe, read_sound
from tools.download.cut import Span, cut
from tools.download.records import PixelRule
from tools.download.ytdlp import Request, YtDlp, finished

pytestmark = pytest.mark.usefixtures("ffmpeg")
RULE = PixelRule(Fraction(40), Fraction(30), Fraction(168), Fraction(126), 144)
NTSC = Fraction(30_000, 1001)
BEEP = 9


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files with byte ranges, as a video host does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last or len(data) - 1) + 1
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data[start:stop])))
        self.end_headers()
        try:
            self.wfile.write(data[start:stop])
        except OSError:
            self.close_connection = True  # the reader has what it wants

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """Address of a server for the folder `tmp_path / "host"`."""
    (tmp_path / "host").mkdir()
    handler = functools.partial(Ranges, directory=str(tmp_path / "host"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def one_stream(source: Path, target: Path, kind: str) -> None:
    """The pictures or the sound of a file alone, its index first, as YouTube has them."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "+faststart"}) as new:
        stream = old.streams.best(kind)
        assert stream is not None
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)


def description(host: str, path: Path) -> Path:
    """What yt-dlp knows of a video after it has asked: here two addresses on this machine."""
    formats = [
        {"format_id": "137", "url": f"{host}/v.mp4", "ext": "mp4", "vcodec": "avc1", "acodec": "none", "height": 144},
        {"format_id": "140", "url": f"{host}/a.m4a", "ext": "m4a", "vcodec": "none", "acodec": "mp4a"},
    ]
    content = {"id": "a" * 11, "title": "t", "extractor": "youtube", "extractor_key": "Youtube", "duration": 20}
    path.write_text(json.dumps(content | {"formats": formats}))
    return path


@pytest.mark.parametrize("rate", [Fraction(25), NTSC], ids=["25", "29.97"])
@pytest.mark.parametrize(("start", "end"), [("8.013", "11.5"), ("8", "10"), ("7.3", "13.77")])
@pytest.mark.parametrize("whole", [False, True], ids=["section", "whole"])
def test_frames_and_sound_of_a_section(
    tmp_path: Path, host: str, rate: Fraction, start: str, end: str, whole: bool
) -> None:
    film = numbered_clip(tmp_path / "film.mp4", int(20 * rate), rate=rate, beep=Fraction(BEEP))
    one_stream(film, tmp_path / "host" / "v.mp4", "video")
    one_stream(film, tmp_path / "host" / "a.m4a", "audio")
    first, last = Fraction(start), Fraction(end)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    request = Request("a" * 11, 144, None if whole else (first - 1, last + 1), scratch)
    command = YtDlp(sleep=0).command(request)[:-2]
    command += ["--load-info-json", str(description(host, tmp_path / "info.json"))]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    offset = Fraction(0) if whole else first - 1
    cut(finished(scratch)[0], tmp_path / "b.mp4", Span(first - offset, last - offset), RULE)
    top, left = number_place((192, 144))
    shown = [number_in(image, top - 30, left - 40) for _, image in pictures_of(tmp_path / "b.mp4")]
    assert shown == [k for k in range(int(20 * rate)) if first <= k / rate < last]
    sound = read_sound(tmp_path / "b.mp4", probe(tmp_path / "b.mp4").zero)
    assert sound is not None
    onset = np.flatnonzero(np.abs(sound.wave) > 0.1)[0] / 16_000
    assert abs(onset - float(BEEP - shown[0] / rate)) <= 0.010
