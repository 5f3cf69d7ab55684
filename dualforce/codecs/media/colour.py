"""HDR and wide-gamut pictures as BT.709 pictures: arithmetic on arrays, knows nothing of decoders.

PQ and HLG are turned into light by ITU-R BT.2100, brought to the range of an SDR display by the EETF of BT.2390, from
BT.2020 to BT.709 primaries by their chromaticities, and coded for a display of gamma 2.4 (BT.1886). SDR white is the
HDR reference white of BT.2408, 203 cd/m2: what is darker than 88 cd/m2 keeps its light, diffuse white becomes code 230,
and 1000 cd/m2 and more become 255. Peaks that a file states are not looked at: one picture is always mapped in one way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.protocols import Pixels

TAG = "bt709-eetf-1000-203-v1"
WHITE = 203.0  # cd/m2, BT.2408: HDR reference white, here the peak of SDR
PEAK = 1000.0  # cd/m2 of a display for which pictures are taken to be made; HLG's nominal peak
GAMMA = 2.4  # of an SDR display, BT.1886 with black at 0
STEPS = 2**16  # of the tables; they are entered by a square root where the curve is steep at 0
BAND = 2**18  # pixels that are turned into light at once

Transfer = Literal["pq", "hlg", "sdr"]
Codes = NDArray[np.uint16]
Light = NDArray[np.float32]  # [3,N] red, green, blue
Table = NDArray[np.float32]
# Chromaticities (x, y) of red, green, blue; white is D65 in all.
PRIMARIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "display-p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)


class Coding(NamedTuple):
    """What the numbers of a picture mean. `luma` are the weights (red, blue) of Y', None for R'G'B'; `full`: they take
    the whole range of their `bits`."""

    transfer: Transfer
    primaries: str
    luma: tuple[float, float] | None
    full: bool
    bits: int


class ToSdr:
    """Pictures of one coding as BT.709 pictures. Its tables (1 MB) are made once: keep it for a stream."""

    def __init__(self, coding: Coding) -> None:
        self.coding = coding
        self._light = _light_table(coding.transfer)
        self._gains = _gain_table()
        self._codes = _code_table()
        self._gamut = gamut(coding.primaries).astype(np.float32)
        self._luminance = _to_xyz("bt2020")[1].astype(np.float32)

    def picture(self, planes: tuple[Codes, Codes, Codes]) -> Pixels:
        """BT.709 picture [H,W,3] uint8 of three planes [H,W] uint16: Y', Cb, Cr, or red, green, blue.

        Their codes are those of the coding's bits, moved up to 16 bits.
        """
        height, width = planes[0].shape
        picture = np.empty((height, width, 3), np.uint8)
        rows = max(1, BAND // width)
        for top in range(0, height, rows):
            part = np.stack([plane[top : top + rows].reshape(-1) for plane in planes])
            picture[top : top + rows] = self._pixels(part).T.reshape(-1, width, 3)
        return picture

    def _pixels(self, codes: Codes) -> Pixels:
        light = self._light[_place(_signal(codes.astype(np.float32), self.coding))]
        if self.coding.transfer == "hlg":
            light *= np.float32(PEAK / WHITE) * (self._luminance @ light) ** np.float32(0.2)  # OOTF, gamma 1.2
        if self.coding.transfer != "sdr":
            light *= self._gain(light.max(axis=0))
        if self.coding.primaries != "bt709":
            light = self._gamut @ light
        return self._codes[_place(np.sqrt(light.clip(0, 1)))]

    def _gain(self, most: Light) -> Light:
        """What light with `most` in its strongest colour, of WHITE, is multiplied with: hue and saturation stay."""
        peak = np.float32(PEAK / WHITE)
        inside = np.minimum(most, peak)
        gain = self._gains[_place(np.sqrt(inside / peak))]
        return np.asarray(gain * (inside / np.maximum(most, np.float32(1e-9))), np.float32)


def _signal(codes: Light, coding: Coding) -> Light:
    """R'G'B' in 0 to 1 of codes [3,N]. Ranges and matrix: BT.2100, BT.709 and BT.601, with codes of 16 bits."""
    if coding.luma is None:
        low, span = (0.0, 65535.0) if coding.full else (4096.0, 56064.0)
        return ((codes - np.float32(low)) / np.float32(span)).clip(0, 1)
    top = float(2**16 - 2 ** (16 - coding.bits))
    low, span, colours = (0.0, top, top) if coding.full else (4096.0, 56064.0, 57344.0)
    luma = (codes[0] - np.float32(low)) / np.float32(span)
    blue, red = (codes[1:] - np.float32(32768)) / np.float32(colours)
    weight_red, weight_blue = coding.luma
    weight_green = 1 - weight_red - weight_blue
    signal = np.empty_like(codes)
    signal[0] = luma + np.float32(2 * (1 - weight_red)) * red
    signal[2] = luma + np.float32(2 * (1 - weight_blue)) * blue
    signal[1] = (luma - np.float32(weight_red) * signal[0] - np.float32(weight_blue) * signal[2]) / np.float32(
        weight_green
    )
    return signal.clip(0, 1)


def pq_light(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light in cd/m2 of a PQ signal in 0 to 1: the EOTF of BT.2100, table 4."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return np.asarray(10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1))


def pq_signal(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """The PQ signal of light in cd/m2: the inverse EOTF of BT.2100, table 4."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (light / 10_000) ** m1
    return np.asarray(((c1 + c2 * power) / (1 + c3 * power)) ** m2)


def hlg_scene(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light of the scene in 0 to 1 of an HLG signal in 0 to 1: the inverse OETF of BT.2100, table 5."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def eetf(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light in cd/m2 of a display that reaches WHITE for light of one that reaches PEAK: BT.2390, section 5.4.1, with
    black at 0. More than PEAK counts as PEAK."""
    top = pq_signal(np.array(PEAK))
    most = pq_signal(np.array(WHITE)) / top
    knee = 1.5 * most - 0.5
    one = np.minimum(pq_signal(light) / top, 1)
    t = (one - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return pq_light(np.where(one < knee, one, spline) * top)


def gamut(primaries: str) -> NDArray[np.float64]:
    """Matrix [3,3] from linear light with other PRIMARIES to linear light with BT.709's (SMPTE RP 177)."""
    return np.asarray(np.linalg.inv(_to_xyz("bt709")) @ _to_xyz(primaries))


def _to_xyz(primaries: str) -> NDArray[np.float64]:
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in PRIMARIES[primaries]]).T
    white = np.array([D65[0] / D65[1], 1, (1 - D65[0] - D65[1]) / D65[1]])
    return np.asarray(columns * np.linalg.solve(columns, white))


def _place(share: Light) -> NDArray[np.uint16]:
    return (share * np.float32(STEPS - 1) + np.float32(0.5)).astype(np.uint16)


def _light_table(transfer: Transfer) -> Table:
    """Light of every signal: of WHITE for PQ, of the scene for HLG, of the display for SDR."""
    curves: dict[Transfer, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "pq": lambda signal: pq_light(signal) / WHITE,
        "hlg": hlg_scene,
        "sdr": lambda signal: signal**GAMMA,
    }
    return curves[transfer](np.linspace(0, 1, STEPS)).astype(np.float32)


def _gain_table() -> Table:
    """Gains of light from 0 to PEAK, entered by the square root of its share of PEAK."""
    light = np.linspace(0, 1, STEPS)[1:] ** 2 * PEAK
    return np.concatenate([[1.0], eetf(light) / light]).astype(np.float32)


def _code_table() -> Pixels:
    """Codes of BT.709 light in 0 to 1, entered by its square root."""
    return np.round(255 * np.linspace(0, 1, STEPS) ** (2 / GAMMA)).astype(np.uint8)
