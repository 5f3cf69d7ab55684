"""The name under which the result of a video is kept: a hash of all that it depends on, and of nothing else.

That is the content of the video and of every file given with it (never their names or times), the options, the
extractors, the code of the stages and the versions of the libraries they run on. What a video is called, whose it is
and under which licence is written into its samples later, so that renaming repeats no work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.files import encode_json
from data_shards.schema import RECORD_VERSION
from dualforce import codecs, preprocess, types
from dualforce.preprocess.job import Job

# Fields of a job that do not change what the stages compute. Every other field counts, also those yet to come.
NAMES = frozenset(("video", "source", "key", "identity", "bytes", "scratch"))
LIBRARIES = (
    "av", "diffusers", "insightface", "mediapipe", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu",
    "opencv-contrib-python", "opencv-contrib-python-headless", "opencv-python", "opencv-python-headless",
    "scenedetect", "silero-vad", "tokenizers", "torch", "transformers",
)  # fmt: skip


class ContentHashes:
    """SHA-256 of files and folders, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """Hash of a file's content, or of names and contents of all files below a folder. Raises OSError."""
        if path not in self._known:
            self._known[path] = _hash_folder(path) if path.is_dir() else hash_file(path)
        return self._known[path]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def surroundings(extractors: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What the results of all videos of a build depend on beside their jobs; `device` is its kind."""
    return {
        "record": RECORD_VERSION,
        "code": _hash_code(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name)) is not None},
        "extractors": extractors,
        "device": device,
    }


def content_id(job: Job, around: Mapping[str, Any], hashes: ContentHashes) -> str:
    """The id of a job's result, 64 hexadecimal digits. Raises OSError for a file that cannot be read."""
    fields = {
        field.name: _plain(getattr(job, field.name), hashes)
        for field in dataclasses.fields(job)
        if field.name not in NAMES
    }
    return digest({"job": fields, "around": around})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(encode_json(value, "content id")).hexdigest()


def _plain(value: Any, hashes: ContentHashes) -> Any:
    """`value` as JSON, paths as the hash of what they lead to."""
    if isinstance(value, Path):
        return {"content": hashes.of(value)}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), hashes) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, hashes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, hashes) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"job: {type(value).__name__}: expected text, numbers, paths, or dataclasses and lists of them")


def _hash_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def _hash_code() -> str:
    """Hash of the sources that make samples: a change of any of them may change the samples."""
    sources = [Path(package.__path__[0]) for package in (codecs, preprocess)]
    files = [
        (f"{root.name}/{path.relative_to(root).as_posix()}", path) for root in sources for path in root.rglob("*.py")
    ]
    return digest({name: hash_file(path) for name, path in sorted([*files, ("types", Path(types.__file__))])})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
