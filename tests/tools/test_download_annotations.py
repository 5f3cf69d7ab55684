"""The parsers, on small files in the published formats with all their quirks."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.download import celebvhq, hdtf, vfhq
from tools.download.records import AnnotationError, Annotations, PixelRule, SquareRule, number, safe_name, video_of

A, B, C, D = "aaaaaaaaaaa", "-bbbbbbbbb_", "_cccccccccc", "ddddddddddd"
GOOD = {
    # Blank lines, blanks and tabs, CRLF, a missing final newline, another order in every file.
    "RD_video_url.txt": f"\r\nRadio1 https://www.youtube.com/watch?v={A}\r\n"
    f"  Radio2\thttps://youtu.be/{B}?t=3  \r\n\r\n"
    f"Radio3 https://www.youtube.com/watch?feature=x&v={C}",
    "RD_annotion_time.txt": "Radio2.mp4 1:02:03-1:02:33\n\nRadio1.mp4  00:10-00:20   01:00-02:30 5:00 - 5:10 \n",
    "RD_crop_wh.txt": "Radio1_1.mp4 10 512 20 500\nRadio2_0.mp4 0 300 0 300\n Radio1_0.mp4\t1 2 3 4 \n",
    "RD_resolution.txt": "Radio2.mp4 1080\nRadio1.mp4 720",
}


def tree(folder: Path, files: dict[str, str] | None = None, **changes: str) -> Path:
    """A folder of HDTF; prefixes without files here get empty ones. Keyword arguments replace files of RD."""
    content = {f"{prefix}_{kind}.txt": "" for prefix in hdtf.PREFIXES
               for kind in ("video_url", "annotion_time", "crop_wh", "resolution")}  # fmt: skip
    content |= GOOD if files is None else files
    content |= {f"RD_{kind}.txt": text for kind, text in changes.items()}
    folder.mkdir(exist_ok=True)
    for name, text in content.items():
        (folder / name).write_bytes(text.encode())
    return folder


def told(found: Annotations, kind: str | None = None) -> list[str]:
    return [str(problem) for problem in found.problems if kind in (None, problem.kind)]


def test_hdtf_joins_by_name(tmp_path: Path) -> None:
    found = hdtf.read(tree(tmp_path))
    clips = {clip.name: clip for clip in found.clips}
    assert sorted(clips) == ["RD_Radio1_0", "RD_Radio1_1", "RD_Radio2_0"]
    one = clips["RD_Radio1_1"]
    assert (one.video, one.start, one.end, one.height) == (A, 60, 150, 720)
    assert one.rule == PixelRule(Fraction(10), Fraction(20), Fraction(522), Fraction(520), 720)
    assert (clips["RD_Radio2_0"].start, clips["RD_Radio2_0"].end) == (3723, 3753)
    assert clips["RD_Radio2_0"].video == B


def test_hdtf_counts_and_what_has_no_partner(tmp_path: Path) -> None:
    found = hdtf.read(tree(tmp_path, crop_wh=GOOD["RD_crop_wh.txt"] + "Radio1_3.mp4 1 2 3 4\nNobody_0.mp4 1 2 3 4\n",
                           annotion_time=GOOD["RD_annotion_time.txt"] + "Radio9.mp4 0:01-0:09\n"))  # fmt: skip
    assert found.counts == {
        "urls": 3, "annotated videos": 3, "time ranges": 5, "crop rows": 5, "joined ranges": 3,
    }  # fmt: skip
    assert told(found) == [
        "RD_video_url.txt:5: 'Radio3': expected a line of this name in RD_annotion_time.txt",
        "RD_annotion_time.txt:3: 'Radio1_2': expected a line of this name in RD_crop_wh.txt",
        "RD_annotion_time.txt:4: 'Radio9': expected a line of this name in RD_video_url.txt",
        "RD_annotion_time.txt:4: 'Radio9': expected a line of this name in RD_resolution.txt",
        "RD_annotion_time.txt:4: 'Radio9_0': expected a line of this name in RD_crop_wh.txt",
        "RD_crop_wh.txt:4: 'Radio1_3': expected a range of this name in RD_annotion_time.txt",
        "RD_crop_wh.txt:5: 'Nobody_0': expected a range of this name in RD_annotion_time.txt",
    ]
    assert {problem.kind for problem in found.problems} == {"join"}


@pytest.mark.parametrize(
    ("kind", "text", "line", "value"),
    [
        ("video_url", f"Radio1\nRadio2 https://youtu.be/{B}", 1, "Radio1"),
        ("video_url", "\nRadio1 https://example.org/watch?v=aaaaaaaaaaa", 2, "example.org"),
        ("video_url", "Radio1 --exec=rm", 1, "--exec"),
        ("video_url", f"../../x https://youtu.be/{A}", 1, "../../x"),
        ("video_url", f"/etc/x https://youtu.be/{A}", 1, "/etc/x"),
        ("annotion_time", "Radio1.mp4", 1, "Radio1.mp4"),
        ("annotion_time", "Radio2.mp4 0:01-0:02\nRadio1.mp4 00:20-00:10", 2, "00:20-00:10"),
        ("annotion_time", "Radio1.mp4 00:61-02:00", 1, "00:61-02:00"),
        ("annotion_time", "Radio1.mp4 1:60:00-2:00:00", 1, "1:60:00"),
        ("annotion_time", "Radio1.mp4 ten-twenty", 1, "ten-twenty"),
        ("annotion_time", "Radio1.mp4 ٠٠:١٠-٠٠:٢٠", 1, "\\u0660"),
        ("crop_wh", "Radio1_0.mp4 1 2 3", 1, "1 2 3"),
        ("crop_wh", "Radio1_0.mp4 1 2 3 4 5", 1, "1 2 3 4 5"),
        ("crop_wh", "Radio1_0.mp4 1 0 3 4", 1, "1 0 3 4"),
        ("crop_wh", "Radio1_0.mp4 1 nan 3 4", 1, "nan"),
        ("crop_wh", "Radio1.mp4 1 2 3 4", 1, "Radio1.mp4"),
        ("crop_wh", "..\\x_0.mp4 1 2 3 4", 1, ".."),
        ("resolution", "Radio1.mp4 big", 1, "big"),
        ("resolution", "Radio1.mp4 0", 1, "0"),
        ("resolution", "Radio1.mp4", 1, "Radio1.mp4"),
    ],
)
def test_hdtf_malformed_line_is_reported_and_the_rest_used(
    tmp_path: Path, kind: str, text: str, line: int, value: str
) -> None:
    found = hdtf.read(tree(tmp_path, **{kind: text}))
    entries = told(found, "malformed")
    assert len(entries) == 1
    assert entries[0].startswith(f"RD_{kind}.txt:{line}: '") and value in entries[0] and "expected" in entries[0]


def test_hdtf_wrong_range_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    found = hdtf.read(tree(tmp_path, annotion_time="Radio1.mp4 x-y 01:00-02:30"))
    assert [clip.name for clip in found.clips] == ["RD_Radio1_1"]


def test_hdtf_second_line_of_a_name_is_reported(tmp_path: Path) -> None:
    found = hdtf.read(tree(tmp_path, resolution="Radio1.mp4 720\nRadio1.mp4 360\nRadio2.mp4 720"))
    assert told(found, "duplicate") == ["RD_resolution.txt:2: 'Radio1': expected a name once; the first is used"]
    assert all(clip.height == 720 for clip in found.clips)


def test_hdtf_bytes_that_are_not_text_are_one_line_only(tmp_path: Path) -> None:
    folder = tree(tmp_path)
    data = (folder / "RD_resolution.txt").read_bytes()
    (folder / "RD_resolution.txt").write_bytes(b"\xef\xbb\xbf" + data + b"\nR\xff\x1b[2J.mp4 720")
    found = hdtf.read(folder)
    assert len(found.clips) == 3
    (entry,) = told(found, "malformed")
    assert entry.isascii() and entry.isprintable()


def test_hdtf_same_name_in_two_parts_is_two_clips(tmp_path: Path) -> None:
    files = GOOD | {name.replace("RD_", "WRA_"): text for name, text in GOOD.items()}
    assert len({clip.name for clip in hdtf.read(tree(tmp_path, files)).clips}) == 6


def test_hdtf_folder_that_holds_the_folder(tmp_path: Path) -> None:
    tree(tmp_path / "HDTF_dataset")
    assert len(hdtf.read(tmp_path).clips) == 3


@pytest.mark.parametrize("name", ["RD_video_url.txt", "WDA_crop_wh.txt", "WRA_resolution.txt"])
def test_hdtf_missing_file_ends_it(tmp_path: Path, name: str) -> None:
    (tree(tmp_path) / name).unlink()
    with pytest.raises(AnnotationError, match=name):
        hdtf.read(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "ytb_id": B,
        "duration": {"start_sec": 10.5, "end_sec": 14},
        "bbox": {"top": 0.1, "bottom": 0.6, "left": 0.25, "right": 0.5},
        "attributes": {"appearance": [0] * 40, "action": [0] * 35, "emotion": {"sep_flag": False, "labels": "neutral"}},
        "version": "v0.1",
    } | changes


def celebv(folder: Path, clips: dict[str, Any]) -> Path:
    path = folder / "celebvhq_info.json"
    path.write_text(json.dumps({"meta_info": {}, "clips": clips}, indent=1))
    return path


def test_celebvhq_keys_that_look_like_options(tmp_path: Path) -> None:
    found = celebvhq.read(celebv(tmp_path, {f"{B}_0": entry(), f"{C}_12": entry(ytb_id=C)}))
    assert [(clip.name, clip.video) for clip in found.clips] == [(f"{B}_0", B), (f"{C}_12", C)]
    assert found.clips[0].rule == SquareRule(Fraction(1, 10), Fraction(6, 10), Fraction(1, 4), Fraction(1, 2))
    assert (found.clips[0].start, found.clips[0].end) == (Fraction(21, 2), 14)
    assert not found.problems and found.counts == {"clips": 2, "videos": 2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x_0", None, "entry = 'None': expected an object"),
        ("x_0", entry(ytb_id="--exec rm"), "ytb_id"),
        ("x_0", entry(ytb_id=7), "ytb_id = 7"),
        ("x_0", entry(duration={"start_sec": 5, "end_sec": 5}), "end after the start"),
        ("x_0", entry(duration={"start_sec": -1, "end_sec": 5}), "duration.start_sec = -1"),
        ("x_0", entry(duration={"start_sec": float("nan"), "end_sec": 5}), "expected a number"),
        ("x_0", entry(duration={"start_sec": 1, "end_sec": float("inf")}), "expected 0 to"),
        ("x_0", entry(duration={"start_sec": True, "end_sec": 5}), "expected a number"),
        ("x_0", entry(duration={"start_sec": 10**400, "end_sec": 5}), "expected 0 to"),
        ("x_0", entry(duration=[1, 2]), "duration"),
        ("x_0", entry(bbox={"top": 0.1, "bottom": 1.2, "left": 0, "right": 1}), "bbox.bottom = 1.2"),
        ("x_0", entry(bbox={"top": 0.7, "bottom": 0.2, "left": 0, "right": 1}), "top < bottom"),
        ("x_0", entry(bbox={"top": 0.1}), "bbox.bottom"),
        ("../../evil", entry(), "file name"),
        ("/abs", entry(), "file name"),
        ("a\nb", entry(), "file name"),
        ("..", entry(), "file name"),
        ("", entry(), "file name"),
        ("n" * 300, entry(), "file name"),
    ],
)
def test_celebvhq_bad_entry_is_reported_with_its_line(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = celebv(tmp_path, {"good_0": entry(), key: value})
    found = celebvhq.read(path)
    assert [clip.name for clip in found.clips] == ["good_0"]
    (problem,) = found.problems
    assert message in str(problem) and problem.file == "celebvhq_info.json" and problem.value == key
    if key == "x_0":
        assert '"x_0"' in path.read_text().split("\n")[problem.line - 1]


class Measured(str):
    """A text that knows how many characters were searched for single strings in it."""

    searched = 0

    def find(self, sub: str, *span: Any) -> int:
        Measured.searched += len(self)
        return super().find(sub, *span)

    def count(self, sub: str, start: int = 0, end: int | None = None) -> int:
        end = len(self) if end is None else end
        Measured.searched += end - start
        return super().count(sub, start, end)


def test_celebvhq_lines_are_found_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published file has 36,000 entries: a search from its beginning for each takes minutes."""
    count = 500
    path = celebv(tmp_path, {f"x_{number}": entry(ytb_id=A if number % 2 else "?") for number in range(count)})
    text = Measured(path.read_text())
    monkeypatch.setattr(celebvhq, "read_text", lambda path: text)
    found = celebvhq.read(tmp_path)
    assert len(found.clips) == count // 2 == len(found.problems)
    lines = text.split("\n")
    assert all(f'"{problem.value}"' in lines[problem.line - 1] for problem in found.problems)
    assert len({problem.line for problem in found.problems}) == count // 2
    assert Measured.searched <= 2 * len(text)


def test_celebvhq_key_that_stands_twice(tmp_path: Path) -> None:
    text = f'{{"clips": {{"k_0": {json.dumps(entry())}, "k_0": {json.dumps(entry(ytb_id=A))}}}}}'
    (tmp_path / "celebvhq_info.json").write_text(text)
    found = celebvhq.read(tmp_path)
    assert [clip.video for clip in found.clips] == [B] and [p.kind for p in found.problems] == ["duplicate"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"clips": []}', "[" * 100_000, '{"clips": 1}'])
def test_celebvhq_other_file_ends_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "celebvhq_info.json").write_text(text)
    with pytest.raises(AnnotationError, match="expected"):
        celebvhq.read(tmp_path)


def vfhq_file(folder: Path, name: str = f"Clip+{B}+P0+C3+F100-250", text: str | None = None) -> Path:
    path = folder / f"{name}.txt"
    path.write_text("H 720\nW 1280\nFPS 25\nCROP 100 50 612 562\n" if text is None else text)
    return path


def test_vfhq_times_and_crop(tmp_path: Path) -> None:
    vfhq_file(tmp_path)
    (clip,) = vfhq.read(tmp_path).clips
    assert (clip.video, clip.start, clip.end, clip.height) == (B, Fraction(99, 25), Fraction(251, 25), 720)
    assert clip.rule == PixelRule(*map(Fraction, (100, 50, 612, 562)), 720, 1280)
    box = clip.rule.box(640, 720)
    assert box is not None and (box.x, box.y, box.width, box.height) == (50, 50, 256, 512)
    assert clip.name.startswith("Clip+-")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffH: 720\r\nW: 1280\r\n\r\nFPS: 29.97\r\nCROP: 100, 50, 612, 562",
        "CLIP x\nCROP(x0, y0, x1, y1): 100 50 612 562\nFPS=29.97\nW\t1280\nH\t720\nHOUR 3\n",
    ],
)
def test_vfhq_other_spellings(tmp_path: Path, text: str) -> None:
    vfhq_file(tmp_path, text=text)
    (clip,) = vfhq.read(tmp_path).clips
    assert clip.start == Fraction(99) / Fraction("29.97") and clip.rule.box(1280, 720) is not None


def test_vfhq_short_clip_is_skipped_with_a_reason(tmp_path: Path) -> None:
    vfhq_file(tmp_path, f"Clip+{A}+P0+C0+F1-99")  # (99 + 1) / 25 - 0 = 4 s: long enough
    vfhq_file(tmp_path, f"Clip+{A}+P0+C1+F2-99")
    found = vfhq.read(tmp_path)
    assert [clip.name[-6:] for clip in found.clips] == ["+F1-99"]
    assert [p.kind for p in found.problems] == ["short"] and "at least 4 s" in told(found)[0]


@pytest.mark.parametrize("rate", ["25.0", "23.976023976023978", "59.94005994005994"])
def test_vfhq_frame_rates_as_doubles_are_printed(tmp_path: Path, rate: str) -> None:
    file = tmp_path / f"Clip+{A}+P0+C0+F101-500.txt"
    file.write_text(f"H 720.0\nW 1280.0\nFPS {rate}\nCROP 100.0 50.0 612.0 562.0\n")
    (clip,) = vfhq.read(tmp_path).clips
    assert (clip.start, clip.end) == (100 / Fraction(rate), 501 / Fraction(rate))


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("Clip+short+P0+C0+F1-200", None, 0, "file name"),
        (f"Clip+{A}+P0+C0+F200-100", None, 0, "last frame after"),
        (f"Clip+{A}+P0+C0", None, 0, "file name"),
        (f"Clip+{A}+P0+C0+F1-200", "H 720\nW 1280\nFPS 25\n", 0, "a line CROP"),
        (f"Clip+{A}+P0+C0+F1-200", "H 720\nW 1280\nFPS 25\nCROP 1 2 3", 4, "4 numbers"),
        (f"Clip+{A}+P0+C0+F1-200", "H 720\nW x\nFPS 25\nCROP 1 2 3 4", 2, "1 number "),
        (f"Clip+{A}+P0+C0+F1-200", "H 720\nW 1280\nFPS 0\nCROP 1 2 3 4", 3, "a number from 1 to 1000"),
        (f"Clip+{A}+P0+C0+F1-200", "H 7.5\nW 1280\nFPS 25\nCROP 1 2 3 4", 1, "a whole number from 1 to 20000"),
        (f"Clip+{A}+P0+C0+F1-200", "\nH 720\nW 1280\nFPS 25\nCROP 3 2 1 4", 5, "x0 < x1"),
    ],
)
def test_vfhq_bad_file_is_reported(tmp_path: Path, name: str, text: str | None, line: int, message: str) -> None:
    vfhq_file(tmp_path)
    bad = vfhq_file(tmp_path, name, text)
    found = vfhq.read(tmp_path)
    assert len(found.clips) == 1
    (problem,) = found.problems
    assert (problem.file, problem.line, problem.kind) == (bad.name, line, "malformed") and message in problem.expected


@pytest.mark.parametrize("read", [hdtf.read, celebvhq.read, vfhq.read])
@pytest.mark.parametrize("make", [lambda folder: folder / "nowhere", lambda folder: folder])
def test_missing_annotations_are_one_line(
    tmp_path: Path, read: Callable[[Path], Annotations], make: Callable[[Path], Path]
) -> None:
    with pytest.raises(AnnotationError, match="expected") as error:
        read(make(tmp_path))
    assert "\n" not in str(error.value)


@given(st.integers(0, 35_999), st.booleans())
def test_time_round_trip(seconds: int, hours: bool) -> None:
    minutes, rest = divmod(seconds, 60)
    text = f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    assert hdtf.parse_time(text) == seconds


@given(st.text())
def test_no_text_breaks_the_small_parsers(text: str) -> None:
    assert hdtf.parse_time(text) is None or ":" in text
    span = hdtf.parse_range(text)
    assert span is None or span[0] < span[1]
    assert number(text) is None or text.strip("+-.0123456789") == ""
    assert video_of(text) is None or "youtu" in text
    if safe_name(text):
        assert Path("/a/b", text).parent == Path("/a/b") and text not in (".", "..") and "\0" not in text
    assert hdtf.split_times(f"x{text}")[0]


@given(st.lists(st.text(st.sampled_from(list(" \t\r\n0123456789:-.x_/mp4RadioV\u2013\x00\x85\u2028")), max_size=40)))
def test_no_lines_break_hdtf(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    folder = tmp_path_factory.mktemp("hdtf")
    text = "\n".join(lines)
    found = hdtf.read(tree(folder, video_url=text, annotion_time=text, crop_wh=text, resolution=text))
    assert all(problem.expected.startswith("expected") and str(problem).isprintable() for problem in found.problems)


@pytest.mark.parametrize(
    ("url", "video"),
    [
        (f"https://www.youtube.com/watch?v={B}", B),
        (f"http://m.youtube.com/watch?app=x&v={A}&t=10s", A),
        (f"youtu.be/{A}", A),
        (f"https://www.youtube.com/watch?v={A}x", None),
        ("https://www.youtube.com/watch?v=short", None),
        (f"https://youtube.com.example.org/watch?v={A}", None),
        (f"file:///etc/passwd?v={A}", None),
        (f"https://youtu.be/{A} --exec x", None),
    ],
)
def test_addresses(url: str, video: str | None) -> None:
    assert video_of(url) == video
