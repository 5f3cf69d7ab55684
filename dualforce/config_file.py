"""Files of a configuration: JSON objects, and run files in particular.

A run file is strict JSON: an unknown key, a wrong type or a value that cannot work is one error that names the file,
the key, the value and what was expected. `extends` names one other file, relative to the file itself, whose keys the
file's own keys override; a file that is extended may not extend another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualforce.config import ConfigError, RunConfig, validate

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of a URL; one letter is a drive of Windows


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file with its `extends` and `key=value` overrides (dotted keys, JSON values or plain words).

    The paths of a file (`deepspeed`, `data.shards`, `data.cache`, `data.video_codec`) are relative to that file; those
    of an override, to the working directory. Raises ConfigError with one line for anything that is missing, unknown or
    out of range.
    """
    values = _read_with_base(path)
    for item in overrides:
        key, found, text = item.partition("=")
        if not found or not key:
            raise ConfigError(f"--set {_told(item)}: expected key=value, for example --set train.steps=10")
        _assign(values, key.split("."), _parse_value(text, key), item)
    told = " ".join(map(_told, overrides))
    return validate(RunConfig, values, f"{path} with --set {told}" if overrides else str(path))


def read_json(path: Path, option: str = "") -> dict[str, Any]:
    """Read a JSON object; ConfigError names the file, and the `option` that gave it, when it is missing or not one, or
    has a key twice."""
    place = f"{option} {path}" if option else str(path)
    try:
        values = decode_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{place}: no such file: expected a JSON object") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: {_why_not(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(values).__name__}")
    return values


def decode_json(text: str) -> Any:
    """What `json.loads` gives and raises; ValueError, too, for a key that an object has twice."""
    return json.loads(text, object_pairs_hook=_each_once)


class _TwiceError(ValueError):
    """A key of a JSON object that comes again."""


def _why_not(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that has the form of JSON, for a message."""
    if isinstance(error, _TwiceError):
        return f"key {error}: given twice: expected once"
    # A ValueError is a number of more than 4300 digits.
    cause = "too many brackets in each other" if isinstance(error, RecursionError) else str(error)
    return f"not JSON that can be read: {cause}"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open what a key that comes twice means; Python would take the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found


def _read_with_base(path: Path) -> dict[str, Any]:
    values = _with_paths(read_json(path), path.parent)
    base_name = values.pop("extends", None)
    if base_name is None:
        return values
    if not isinstance(base_name, str):
        raise ConfigError(f"{path}: extends = {base_name!r}: expected the name of a run file")
    base_path = path.parent / base_name
    if not base_path.is_file():
        raise ConfigError(f"{path}: extends = {base_name}: no such file {base_path}")
    base = _with_paths(read_json(base_path), base_path.parent)
    if "extends" in base:
        raise ConfigError(f"{path}: extends {base_path}, which extends another file; expected one level")
    return _merged(base, values)


def _with_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths of a file independent of the working directory."""
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = str(folder / values["deepspeed"])
    data = values.get("data")
    if isinstance(data, dict):
        for name in ("cache", "video_codec"):
            if isinstance(data.get(name), str):
                data[name] = str(folder / data[name])
        if "shards" in data:
            data["shards"] = _sets_from(data["shards"], folder)
    return values


def _sets_from(shards: Any, folder: Path) -> Any:
    """Names of shard sets in a file of `folder`; what is no text is left for the check of types."""
    if isinstance(shards, list):
        return [_sets_from(one, folder) for one in shards]
    return str(folder / shards) if isinstance(shards, str) and shards and not _SCHEME.match(shards) else shards


def _merged(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in delta.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def _told(item: str) -> str:
    """An override for messages: a URL may hold a password."""
    return f"{re.split('=|://', item)[0]}=..." if "://" in item else item


def _parse_value(text: str, key: str) -> Any:
    try:
        return decode_json(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set {key}: {_why_not(error)}") from None


def _assign(values: dict[str, Any], key: list[str], value: Any, item: str) -> None:
    section = values
    for name in key[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {_told(item)}: {name} is a value, not a section")
    section[key[-1]] = value
