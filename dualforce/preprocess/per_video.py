"""Files that say something of each video: a JSON object from paths below the folder of videos, without ending."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from data_shards.schema import shown
from dualforce.config_file import read_json


class PerVideoError(ValueError):
    """A file of this kind that cannot be used; one line for the user."""


def read_per_video(
    path: Path, sources: Iterable[str], option: str, expected: str, most: int, error: type[PerVideoError]
) -> dict[str, str]:
    """The text for every one of `sources` (paths below the folder of videos). Entries without a video are left alone.

    Raises ConfigError for a file that is no JSON object, and `error`, which names the `option`, for a video without
    entry or an entry that is no text, where `expected` says what it should be, or one of more than `most` characters:
    texts stand in the record of every sample, which has its bound.
    """
    content = read_json(path, option)
    found, missing = {}, []
    for source in sources:
        name = str(PurePosixPath(source).with_suffix(""))
        if name not in content:
            missing.append(name)
            continue
        text = content[name]
        if not isinstance(text, str) or not text.strip():
            raise error(f"{option} {path}: {name!r}: {shown(text)}: expected {expected}")
        if len(text) > most:
            raise error(f"{option} {path}: {name!r}: {len(text)} characters: expected at most {most}")
        found[source] = text
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise error(f"{option} {path}: {missing[0]!r}{more} missing: expected an entry for each video")
    return found
