"""HDR and wide-gamut clips come out as BT.709 pictures, against a reference in float64; ordinary ones as before."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.clips import textured, write_frames

from dualforce.codecs.media import MediaError, Treatment, colour, colour_tags, iter_frames, probe, read_image
from dualforce.codecs.media.colour import eetf, gamut, hlg_scene, pq_light, pq_signal

SIDE = 32  # of a patch
WHITE, PEAK = 203.0, 1000.0
BT2020 = np.array([0.2627, 0.6780, 0.0593])
# BT.2087, table of M2 (four digits).
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
# Light of patches in cd/m2, red, green, blue of BT.2020: greys, skin, saturated colours, highlights.
GREYS = [0, 0.05, 1, 5, 10, 26, 50, 91, 100, 150, 203, 400, 700, 1000, 4000, 10_000]
COLOURS = [(60, 40, 30), (90, 70, 55), (200, 20, 20), (20, 200, 20), (20, 20, 200), (10, 100, 120), (500, 300, 100),
           (900, 1000, 100)]  # fmt: skip
LIGHTS = np.array([*[(grey,) * 3 for grey in GREYS], *COLOURS], np.float64)
TAGS = {"pq": (16, 9, 9), "hlg": (18, 9, 9)}  # transfer, primaries, matrix


def reference(signal: np.ndarray, transfer: str) -> np.ndarray:
    """SDR codes [N,3] float64 of R'G'B' signals [N,3], by the formulas as the recommendations write them."""
    light = pq_to_light(signal) if transfer == "pq" else hlg_to_light(signal)
    most = light.max(axis=1, keepdims=True)
    mapped = np.array([[eetf_of(value[0])] for value in most])
    light = light * np.divide(mapped, most, out=np.ones_like(most), where=most > 0) / WHITE
    return 255 * (light @ TO_709.T).clip(0, 1) ** (1 / 2.4)


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    root = signal ** (1 / 78.84375)
    return 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    power = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_to_light(signal: np.ndarray) -> np.ndarray:
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return PEAK * (scene @ BT2020)[:, None] ** 0.2 * scene


def light_to_hlg(light: np.ndarray) -> np.ndarray:
    luminance = (light / PEAK) @ BT2020
    scene = light / PEAK * np.maximum(luminance, 1e-12)[:, None] ** (0.2 * -1 / 1.2)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene),
        0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073,
    )  # fmt: skip


def eetf_of(light: float) -> float:
    top = light_to_pq(np.array(PEAK))
    most = light_to_pq(np.array(WHITE)) / top
    knee, one = 1.5 * most - 0.5, min(1.0, light_to_pq(np.array(light)) / top)
    if one >= knee:
        t = (one - knee) / (1 - knee)
        one = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return float(pq_to_light(np.array(one * top)))


def to_ycc(signal: np.ndarray, luma: tuple[float, float], full: bool = False, bits: int = 10) -> np.ndarray:
    """Codes [N,3] of R'G'B' signals."""
    red, blue = luma
    y = signal @ [red, 1 - red - blue, blue]
    ycc = np.stack([y, (signal[:, 2] - y) / (2 - 2 * blue), (signal[:, 0] - y) / (2 - 2 * red)], axis=1)
    unit = 2.0 ** (bits - 8)
    scale = np.array([219, 224, 224]) * unit if not full else np.full(3, 2.0**bits - 1)
    return np.round(ycc * scale + np.array([0 if full else 16, 128, 128]) * unit)


def to_rgb(codes: np.ndarray, luma: tuple[float, float]) -> np.ndarray:
    """R'G'B' signals of 10-bit codes of limited range."""
    y, u, v = ((codes - [64, 512, 512]) / [876, 896, 896]).T
    r, b = y + 2 * (1 - luma[0]) * v, y + 2 * (1 - luma[1]) * u
    return np.stack([r, (y - luma[0] * r - luma[1] * b) / (1 - sum(luma)), b], axis=1).clip(0, 1)


def patches(codes: np.ndarray, pix_fmt: str = "yuv420p10le") -> av.VideoFrame:
    """A picture of flat patches in a row, of codes [N,3]."""
    frame = av.VideoFrame(SIDE * len(codes), SIDE, pix_fmt)
    for plane, values in zip(frame.planes, codes.T, strict=True):
        kind = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
        row = np.zeros(plane.line_size // np.dtype(kind).itemsize, kind)
        row[: plane.width] = np.repeat(values.astype(kind), plane.width // len(codes))
        plane.update(np.tile(row, plane.height).tobytes())
    return frame


def write(path: Path, frame: av.VideoFrame, tags: Sequence[int], codec: str = "ffv1", full: bool = False) -> None:
    def touch(stream: av.VideoStream) -> None:
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = tags
        context.color_range = 2 if full else 1
        frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = *tags, 2 if full else 1

    options = {"qp": "0", "preset": "ultrafast"} if codec == "libx264" else {}
    write_frames(path, [frame] * 3, codec, Fraction(25), options, touch)


def middles(path: Path, **options: int) -> np.ndarray:
    """Colours [N,3] in the middle of the patches."""
    picture = next(iter_frames(path, **options))[1]
    side = picture.shape[0]
    return picture[side // 2, side // 2 :: side].astype(np.float64)


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_patches(transfer: str, name: str, tmp_path: Path) -> None:
    """Within one code of the reference for what the file holds; what rounding to 10 bits costs is apart."""
    lights = LIGHTS if transfer == "pq" else LIGHTS[LIGHTS.max(axis=1) <= PEAK]
    signal = light_to_pq(lights) if transfer == "pq" else light_to_hlg(lights)
    codes = to_ycc(signal.clip(0, 1), (0.2627, 0.0593))
    write(tmp_path / name, patches(codes), TAGS[transfer], "ffv1" if name.endswith("mkv") else "libx264")
    found = middles(tmp_path / name)
    assert np.abs(found - reference(to_rgb(codes, (0.2627, 0.0593)), transfer)).max() <= 1.01
    wanted = reference(signal.clip(0, 1), transfer)
    shown = lights.max(axis=1) >= 1  # of less light a step of 10 bits is more than a step of 8
    assert np.abs(found - wanted)[shown].max() <= 3
    assert np.abs(np.diff(found[np.ptp(lights, axis=1) == 0])).max() <= 1  # greys are grey
    half = middles(tmp_path / name, max_side=SIDE * len(lights) // 2)
    assert np.abs(half - found).max() <= 1


def test_the_curves_are_those_of_the_recommendations() -> None:
    """Points that BT.2100, BT.2408 and BT.2390 name."""
    assert pq_signal(np.array([100.0, 203.0, 1000.0, 10_000.0])) == pytest.approx([0.508, 0.581, 0.752, 1], abs=5e-4)
    assert pq_light(pq_signal(np.array([0.0, 1.0, 203.0]))) == pytest.approx([0, 1, 203], abs=1e-6)
    assert PEAK * hlg_scene(np.array([0.75, 0.5, 1.0])) ** 1.2 == pytest.approx([203, 50.7, 1000], rel=5e-3)
    assert eetf(np.array([10.0, 80.0, 1000.0, 5000.0])) == pytest.approx([10, 80, 203, 203], rel=1e-6)
    assert np.all(np.diff(eetf(np.linspace(0.1, 1000, 999))) > 0)
    assert np.abs(gamut("bt2020") - TO_709).max() < 2e-4
    assert gamut("display-p3").sum(axis=1) == pytest.approx(1)


def test_diffuse_white_and_a_face_in_hdr(tmp_path: Path) -> None:
    """What a viewer expects: diffuse white is bright and not cut off, a face is as bright as in SDR."""
    codes = to_ycc(light_to_pq(np.array([(203.0,) * 3, (60, 42, 33)])), (0.2627, 0.0593))
    write(tmp_path / "a.mkv", patches(codes), TAGS["pq"])
    white, face = middles(tmp_path / "a.mkv")
    assert 225 <= white[0] <= 235 and 120 <= face[0] <= 175 and face[0] > face[1] > face[2]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "luma"), [(1, (0.2126, 0.0722)), (6, (0.299, 0.114)), (9, (0.2627, 0.0593))])
@pytest.mark.parametrize("bits", [8, 10])
def test_matrix_and_range_of_sdr(matrix: int, luma: tuple[float, float], full: bool, bits: int, tmp_path: Path) -> None:
    """As the file says, within two codes (FFmpeg's fixed-point arithmetic)."""
    signal = np.array([(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (0.8, 0.4, 0.3), (0.2, 0.7, 0.3), (0.3, 0.2, 0.9)])
    pix_fmt = "yuv420p10le" if bits == 10 else "yuv420p"
    frame = patches(to_ycc(signal, luma, full, bits), pix_fmt)
    write(tmp_path / "a.mkv", frame, (1, 1, matrix), full=full)
    assert np.abs(middles(tmp_path / "a.mkv") - 255 * signal).max() <= 2.01


@pytest.mark.parametrize(("primaries", "name"), [(9, "bt2020"), (12, "display-p3")])
def test_wide_gamut_sdr(primaries: int, name: str, tmp_path: Path) -> None:
    """Greys stay; a colour that BT.709 has too comes out as it is coded there."""
    inside = np.array([(0.2, 0.2, 0.2), (0.9, 0.9, 0.9), (0.8, 0.5, 0.4), (0.3, 0.6, 0.4)])
    signal = (inside**2.4 @ np.linalg.inv(gamut(name)).T) ** (1 / 2.4)
    codes = to_ycc(signal, (0.2126, 0.0722))
    write(tmp_path / "a.mkv", patches(codes), (1, primaries, 1))
    assert np.abs(middles(tmp_path / "a.mkv") - 255 * inside).max() <= 1.5


def test_hdr_rgb(tmp_path: Path) -> None:
    signal = light_to_pq(LIGHTS[:14])
    codes = np.round(signal * 1023)
    write(tmp_path / "a.mkv", patches(codes[:, [1, 2, 0]], "gbrp10le"), (16, 9, 0), full=True)
    assert np.abs(middles(tmp_path / "a.mkv") - reference(codes / 1023, "pq")).max() <= 1.5


def test_large_pictures_are_turned_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the bands changes nothing."""
    planes = tuple(np.random.default_rng(0).integers(4096, 60_000, (3, 37, 53)).astype(np.uint16))
    coding = colour.Coding("hlg", "bt2020", (0.2627, 0.0593), False, 10)
    whole = colour.ToSdr(coding).picture(planes)
    monkeypatch.setattr(colour, "BAND", 60)
    assert np.array_equal(colour.ToSdr(coding).picture(planes), whole) and whole.std() > 20


def test_what_was_put_right_is_told(tmp_path: Path) -> None:
    codes = to_ycc(light_to_pq(LIGHTS[:3]), (0.2627, 0.0593))
    write(tmp_path / "a.mkv", patches(codes), TAGS["hlg"])
    treatment = Treatment()
    assert len(list(iter_frames(tmp_path / "a.mkv", treatment=treatment))) == 3
    assert treatment.entry() == {
        "bits": 10, "transfer": "arib-std-b67", "primaries": "bt2020", "colour": "bt709-eetf-1000-203-v1",
    }  # fmt: skip
    write(tmp_path / "b.mkv", patches(codes // 4, "yuv420p"), (1, 1, 1))
    plain = Treatment()
    list(iter_frames(tmp_path / "b.mkv", treatment=plain))
    assert plain.entry() == {} and Treatment().entry() == {}


def test_an_unknown_matrix_is_refused(tmp_path: Path) -> None:
    frame = patches(to_ycc(light_to_pq(LIGHTS[:3]), (0.2627, 0.0593)))
    write(tmp_path / "a.mkv", frame, (16, 9, 14))  # ICtCp
    with pytest.raises(MediaError, match=r"a\.mkv: colour matrix 14 .*: expected BT\.601"):
        read_image(tmp_path / "a.mkv")


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p10le", "yuv444p", "gray"])
def test_ordinary_pictures_are_as_ffmpeg_gives_them(pix_fmt: str, tmp_path: Path) -> None:
    pictures = textured(4, 96)
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt) for picture in pictures]
    codec = "ffv1" if pix_fmt != "yuvj420p" else "mjpeg"
    write_frames(tmp_path / "a.mkv", frames, codec, Fraction(25), {})
    with av.open(str(tmp_path / "a.mkv")) as file:
        wanted = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    found = [picture for _, picture in iter_frames(tmp_path / "a.mkv")]
    assert np.array_equal(found, wanted) and probe(tmp_path / "a.mkv").width == 96


def test_every_tag_that_is_read_has_a_name() -> None:
    assert set(colour_tags.TRANSFERS) <= set(colour_tags.TRANSFER_NAMES)
    assert set(colour_tags.PRIMARIES.values()) == set(colour.PRIMARIES)
