"""The file of `--limits`: a JSON object of what is asked of a video, in place of the defaults."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dualforce.config import ConfigError
from dualforce.config_file import read_json
from dualforce.preprocess.quality import Limits

_LARGEST = {"seconds": 3600.0, "face_share": 2.0, "yaw_degrees": 180.0, "sharpness": 8.0}  # shares and levels: 1


def read_limits(path: Path) -> Limits:
    """The limits of a file; what it does not name is as in `Limits`. Raises ConfigError (one line: file, key, value,
    expectation) for a file that is no JSON object, an unknown key, another type, or a value out of range."""
    content = read_json(path, "--limits")
    known = {field.name: field.default for field in fields(Limits)}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"--limits {path}: unknown key {key!r}: {hint}")
        expected = _expected(key, value, known[key])
        if expected:
            raise ConfigError(f"--limits {path}: {key}: {str(value)[:40]!r}: expected {expected}")
    return replace(Limits(), **content)


def _expected(key: str, value: Any, default: Any) -> str | None:
    """What was expected instead of `value`; None when it is right."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    largest = _LARGEST.get(key, 1.0)
    # NaN and infinity, which Python reads, fail the comparison.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 0 <= value <= largest else f"a number from 0 to {largest:g}"
