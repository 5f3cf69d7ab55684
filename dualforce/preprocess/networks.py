"""Every network and fixed method that has a part in a build: what it does, its tag, the version of the package behind
it, and the hash of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from dualforce import __version__
from dualforce.codecs import face_landmarker, voice_activity
from dualforce.codecs.provenance import origin_of, package_of
from dualforce.preprocess import scenes
from dualforce.preprocess.content_id import ContentHashes
from dualforce.preprocess.options import BuildOptions


class Part(NamedTuple):
    """What is done, with which `tag`, by the weights of which file or folder (None: without, or not given).
    `came_along`: it was done before, by code that nobody names here."""

    part: str
    tag: str
    model: Path | None = None
    came_along: bool = False


def networks_of(
    options: BuildOptions,
    extractors: Mapping[str, Mapping[str, Any]],
    faces: str | None,
    sidecars: bool,
    hashes: ContentHashes,
) -> list[dict[str, Any]]:
    """One entry for each part: `part`, `tag`, `origin` with its licence, `package` and `version` of the code (None
    where others computed it), and `sha256` of the weights (None without): of the file, or of the names and contents
    in a folder. `faces` is the tag of the face detector, if there is one; `sidecars`: motion and faces come from
    beside the videos. Raises OSError for a file that cannot be read."""
    parts = _parts(options, {stream: entry["tag"] for stream, entry in extractors.items()}, faces, sidecars)
    found = [_entry(part, None if part.model is None else hashes.of(part.model)) for part in parts]
    speech = voice_activity.installed()
    return [*found, _entry(Part("speech", speech.tag), speech.weights)]


def _parts(options: BuildOptions, tags: Mapping[str, str], faces: str | None, sidecars: bool) -> Iterator[Part]:
    landmarker = None if sidecars else options.face_landmarker
    models = {
        "video": options.video_codec,
        "motion": options.motion_extractor or landmarker,
        "audio": options.audio_encoder,
        "flame": options.flame_encoder,
        "text": options.text_encoder,
    }
    for stream, tag in tags.items():
        yield Part(stream, tag, models[stream], stream == "motion" and sidecars)
    yield Part("scenes", scenes.TAG)
    if faces is not None:
        yield Part("face track", faces, options.face_detector)
    elif landmarker is not None:
        yield Part("face track", face_landmarker.TAG, landmarker)
    if landmarker is not None and (options.motion_extractor or options.flame_encoder):
        yield Part("faces in the crops", face_landmarker.TAG, landmarker)


def _entry(part: Part, sha256: str | None) -> dict[str, Any]:
    package = None if part.came_along else package_of(part.tag)
    code = {None: None, "dualforce": __version__}
    return {
        "part": part.part,
        "tag": part.tag,
        "origin": origin_of(part.tag),
        "package": package,
        "version": code[package] if package in code else version(str(package)),
        "sha256": sha256,
    }
