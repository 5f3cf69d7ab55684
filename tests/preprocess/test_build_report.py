"""The report: what it counts, what it shows, and that names of files cannot become part of the page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers.clips import sidecar_json, textured, tone, write_sidecar

from dualforce.codecs.media import encode_jpeg, write_video
from dualforce.preprocess.build import BuildError, BuildOptions, BuildReport, build_shards
from dualforce.preprocess.charts import HEIGHT, WIDTH, histogram
from dualforce.preprocess.job import Job
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.report import Entry, Made, Tally, printable, write_report
from dualforce.preprocess.work import Result

TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "div", "figure",
    "img", "figcaption", "br", "svg", "rect",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "src", "alt", "viewbox", "width", "height", "role",
    "x", "y",
}  # fmt: skip
NAMES = (
    "<script>alert(1)</script>",  # a folder and a file
    '"><img src=x onerror=alert(1)>',
    "'&amp;{{ 7*7 }}{% raw %}",
    "\u202egpj.\u2066x\x1b[31m\nline",
    "plain",
)


class Page(HTMLParser):
    """Tags, attributes, pictures and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()
        self.pictures: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(tag, name) for name, _ in attrs}
        self.pictures += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def picture_of(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    with av.open(io.BytesIO(base64.b64decode(data, validate=True))) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildReport, Path]:
    folder = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(NAMES):
        path = folder / "src" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, textured(82, seed=seed), tone(84, 0.1))
        licence = "<b>free</b>" if name == "plain" else None
        write_sidecar(path, sidecar_json(82, identity=f"{name}\ud800", licence=licence))
    write_video(folder / "src" / "<i>mute</i>.mp4".replace("/", "|"), textured(82, seed=9), None)
    write_sidecar(folder / "src" / "<i>mute<|i>.mp4", sidecar_json(82))
    (folder / "src" / "<u>.mp4").write_text("no video")
    write_sidecar(folder / "src" / "<u>.mp4", sidecar_json(82))
    (folder / "src" / "<a href=x>.mp4").write_text("no video either")
    write_sidecar(folder / "src" / "<a href=x>.mp4", sidecar_json(82, fps=30))
    options = BuildOptions(size=64, origin="<h1>mine</h1>", licence="none & such")
    return build_shards(folder / "src", folder / "out", options), folder / "out"


def test_names_cannot_become_part_of_the_page(built: tuple[BuildReport, Path]) -> None:
    _, out = built
    page = Page(out / "report.html")
    assert set(page.tags) <= TAGS and page.tags["h1"] == 1
    assert {name for _, name in page.attributes} <= ATTRIBUTES
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in page.pictures)
    assert "default-src 'none'" in (out / "report.html").read_text()
    for name in NAMES[:3]:
        assert f"{name}.mp4" in page.text
    assert "49" not in page.text.partition("{{ 7*7 }}")[0][-20:]
    assert "\\u202egpj.\\u2066x\\x1b[31m" in page.text and "\u202e" not in page.text and "\x1b" not in page.text
    for text in ("<i>mute<|i>.mp4", "<u>.mp4", "<a href=x>.mp4", "<h1>mine</h1>", "<b>free</b>", "none & such"):
        assert text in page.text
    assert html.escape("<u>.mp4") in (out / "report.html").read_text()


def test_pictures_are_those_of_the_videos(built: tuple[BuildReport, Path]) -> None:
    """A crop of each used video, a frame of the rejected one that could be read, none of what is no video."""
    _, out = built
    page = Page(out / "report.html")
    assert len(page.pictures) == 6 and page.text.count("no picture") == 1
    shapes = [picture_of(uri).shape for uri in page.pictures]
    assert shapes == [(128, 128, 3)] * 6
    frame = textured(82, seed=9)[25]
    rejected = picture_of(page.pictures[-1]).astype(float)
    rows = np.linspace(0, 159, 128).astype(int)
    assert np.abs(rejected - frame[rows][:, rows].astype(float)).mean() < 12
    assert max(np.abs(picture_of(uri).astype(float) - rejected).mean() for uri in page.pictures[:5]) > 30


def test_facts(built: tuple[BuildReport, Path]) -> None:
    report, out = built
    facts = json.loads((out / "report.json").read_text())
    assert (facts["videos"], facts["videos_used"], facts["samples"], facts["videos_done_earlier"]) == (8, 5, 5, 0)
    assert facts["reasons"] == {
        "E_DECODE": {"videos": 1, "windows": 0},
        "E_SIDECAR": {"videos": 1, "windows": 0},
        "R_NOAUDIO": {"videos": 1, "windows": 0},
    }
    assert facts["rejected"] == report.manifest["rejected"] and facts["extractors"] == report.manifest["extractors"]
    assert facts["licences"] == {"<b>free</b>": 1, "none & such": 4} == report.manifest["info"]["licences"]
    assert facts["info"]["origin"] == "<h1>mine</h1>" == report.manifest["info"]["origin"]
    assert {name: split["samples"] for name, split in facts["splits"].items()} == {"train": 4, "validation": 1}
    charts = {chart["title"]: chart for chart in facts["histograms"]}
    assert charts["length of the videos used, s"]["count"] == 5
    assert 3.2 < charts["length of the videos used, s"]["median"] < 3.5
    assert charts["longer side of the face, pixels of the source"]["median"] == 80
    # RMS of a tone of amplitude 0.1 that swells and fades: 0.1 / sqrt 2 * sqrt(0.6^2 + 0.4^2 / 2)
    assert abs(charts["loudness of the video, dB of full scale"]["median"] - 20 * np.log10(0.0469)) < 0.5
    yaw = charts["mean yaw of the sample, as the motion extractor gives it"]
    # Degrees of 81 pixel frames, 0.0 to 8.0, of which the first stands four times.
    assert yaw["least"] == yaw["most"] and abs(yaw["median"] - 324 / 84) < 1e-3


def test_windows_of_used_videos_count_apart(tmp_path: Path) -> None:
    made = fake(tmp_path, 1, rejected=[
        {"source": "a", "reason": "R_CUT", "detail": "-", "window": 1},
        {"source": "b", "reason": "R_CUT", "detail": "-"},
    ])  # fmt: skip
    write_report(tmp_path, made)
    assert json.loads((tmp_path / "report.json").read_text())["reasons"] == {"R_CUT": {"videos": 1, "windows": 1}}


def test_the_page_is_bounded(tmp_path: Path) -> None:
    """Thousands of videos: 48 pictures a sheet, from all over the list, every reason among the rejected ones."""
    detail = "d" * 200
    rejected = [{"source": f"r{n}", "reason": "R_SHORT", "detail": detail} for n in range(5000)]
    made = fake(tmp_path, 3000, rejected)
    refused = [Entry(job(f"r{n}"), result(tmp_path, rejected=(entry,))) for n, entry in enumerate(rejected)]
    odd = {"source": "odd", "reason": "R_CUT", "detail": "rare"}
    made.entries.extend([*refused, Entry(job("odd"), result(tmp_path, rejected=(odd,)))])
    write_report(tmp_path, made)
    page = Page(tmp_path / "report.html")
    assert page.tags["figure"] == 48 + 48 + 1 and "R_CUT: rare" in page.text and "used 2937" in page.text
    assert "4500 more are in report.json" in page.text
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert len(json.loads((tmp_path / "report.json").read_text())["rejected"]) == 5000


def test_a_build_of_nothing_leaves_its_report(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.mp4").write_text("no video")
    write_sidecar(tmp_path / "src" / "a.mp4", sidecar_json(82))
    with pytest.raises(BuildError, match=r"no video gave a sample: a\.mp4: E_DECODE: .*\(see .*report\.html\)"):
        build_shards(tmp_path / "src", tmp_path / "out", BuildOptions(size=64))
    page = Page(tmp_path / "out" / "report.html")
    assert "0 samples of 0 of 1 videos" in page.text and "E_DECODE" in page.text
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_histogram() -> None:
    values = [0.0, 1.0, 1.0, 5.0, 24.0]
    chart = histogram("x", values)
    assert (chart.count, chart.least, chart.median, chart.most) == (5, 0, 1, 24)
    assert chart.counts[:6] == (1, 2, 0, 0, 0, 1) and sum(chart.counts) == 5 and chart.counts[-1] == 1
    x, y, width, height, words = chart.bars[1]
    assert (x, y, height, words) == (WIDTH / 24, 0, HEIGHT, "1 to 2: 2") and 0 < width < WIDTH / 24
    assert chart.bars[0][1] == HEIGHT / 2 and chart.bars[2][3] == 0
    assert histogram("x", [3.0, 3.0]).counts == (2,)
    for bad in ([], [float("nan")]):
        with pytest.raises(ValueError, match="expected finite ones"):
            histogram("x", bad)


def test_pictures_keep_their_colours(tmp_path: Path) -> None:
    picture = np.zeros((97, 130, 3), np.uint8)
    picture[:, 40:80], picture[:, 80:] = (255, 255, 255), (200, 40, 90)
    with av.open(io.BytesIO(encode_jpeg(picture))) as container:
        found = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert found.shape == picture.shape
    for x in (20, 60, 110):
        assert np.abs(found[48, x].astype(int) - picture[48, x]).max() <= 6


def test_printable() -> None:
    assert printable("a\u202eb\ud800c\x00é") == "a\\u202eb\\ud800c\\x00é"
    assert printable(3) == 3


def job(source: str) -> Job:
    return Job(Path(source), source, "k", "i", "0" * 64, 1, 64, Limits(), None, None, Path())


def result(folder: Path, *, samples: int = 0, rejected: tuple[dict[str, Any], ...] = ()) -> Result:
    return Result("id", folder, tuple(folder / str(n) for n in range(samples)), rejected, 1.0, {})


def fake(folder: Path, used: int, rejected: list[dict[str, Any]]) -> Made:
    entries = [Entry(job(f"used {n}"), result(folder, samples=1)) for n in range(used)]
    info = {"videos": used, "origin": None}
    return Made(entries, rejected, Tally(), {"video": {"tag": "t"}}, [], info, None, 1.0, "now")
