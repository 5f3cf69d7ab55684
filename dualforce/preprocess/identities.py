"""Who is in which video, where a file says so: videos of one person must not end in both splits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dualforce.config import read_json


class IdentityError(ValueError):
    """A file of identities that cannot be used; one line for the user."""


def read_identities(path: Path, sources: Iterable[str]) -> dict[str, str]:
    """Identity of every one of `sources` (paths below the folder of videos) from a JSON object whose keys are such
    paths without their ending. Entries without a video are left alone.

    Raises ConfigError for a file that is no JSON object, IdentityError for a video that it does not name, or whose
    person is not a text.
    """
    content = read_json(path)
    found, missing = {}, []
    for source in sources:
        name = str(PurePosixPath(source).with_suffix(""))
        if name not in content:
            missing.append(name)
            continue
        identity = content[name]
        if not isinstance(identity, str) or not identity:
            raise IdentityError(f"--identities {path}: {name!r}: {identity!r}: expected a name of the person")
        found[source] = identity
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise IdentityError(f"--identities {path}: {missing[0]!r}{more} missing: expected an entry for each video")
    return found
