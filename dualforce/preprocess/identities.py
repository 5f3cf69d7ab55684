"""Who is in which video, where a file says so: videos of one person must not end in both splits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dualforce.codecs.motion_sidecar import MAX_TEXT
from dualforce.preprocess.per_video import PerVideoError, read_per_video


class IdentityError(PerVideoError):
    """A file of identities that cannot be used; one line for the user."""


def read_identities(path: Path, sources: Iterable[str]) -> dict[str, str]:
    """Identity of every one of `sources`, from a file as `read_per_video` reads it.

    Raises ConfigError for a file that is no JSON object, IdentityError for a video that it does not name, or whose
    person is not a text or longer than a sidecar may name one.
    """
    return read_per_video(path, sources, "--identities", "a name of the person", MAX_TEXT, IdentityError)
