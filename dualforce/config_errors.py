"""What pydantic says about a configuration, as one line for the user."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError


def describe(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line for the first fault in `error`, met while building `kind`: the key, the value, and what was expected."""
    errors = error.errors()
    start = _path(errors[0]["loc"], kind)
    # A union reports one error for each of its kinds; the deepest has understood most of the value.
    union = [one for one in errors if _path(one["loc"], kind)[: len(start)] == start]
    first = max(union, key=lambda one: len(_path(one["loc"], kind)))
    path = _path(first["loc"], kind)
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys_at(kind, path[:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
        return f"unknown key {key} = {json.dumps(first['input'])}{hint}"
    if first["type"] == "missing":
        return f"key {key} is missing"
    reasons = dict.fromkeys(
        one["msg"].removeprefix("Value error, ") for one in union if _path(one["loc"], kind) == path
    )
    value = json.dumps(first["input"], default=str)
    return f"{key or kind.__name__} = {value if len(value) < 120 else value[:117] + '...'}: {', or: '.join(reasons)}"


def _path(location: Sequence[int | str], kind: type[BaseModel]) -> list[str]:
    """The keys and list places of an error's location, without the names that pydantic gives the kinds of a union."""
    path: list[str] = []
    for part in location:
        if isinstance(part, int) or part in _keys_at(kind, path) or not _inside_value(kind, path):
            path.append(str(part))
    return path


def _inside_value(kind: type[BaseModel], path: list[str]) -> bool:
    """Whether `path` leads to a value, so that what follows is no key."""
    return bool(path) and not _keys_at(kind, path)


def _keys_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        choices = () if field is None else (field.annotation, *get_args(field.annotation))
        sections = [one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)]
        if not sections:
            return []
        kind = sections[0]
    return list(kind.model_fields)
