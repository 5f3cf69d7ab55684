"""What names somebody or something in the texts of a set: whole names, in capital letters or not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_PART = re.compile(r"\d+|[^\W\d_]+|.", re.DOTALL)


class Names:
    """Some names, looked for in texts: "id1" is in "id1.mp4" and "my_ID1b", but not in "id10" or "paid1".

    A name ends where letters do not go on as letters, nor digits as digits. Rather too much is found than too little:
    what is lost is a line of a report. The time for a text does not grow with the number of names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # A name is whole in a text exactly where its parts are some of the text's, one after the other.
        self._names = {_parts(name) for name in names}
        self._lengths: dict[str, set[int]] = {}  # by first part
        for parts in self._names:
            self._lengths.setdefault(parts[0], set()).add(len(parts))

    def are_in(self, text: str) -> bool:
        """Whether `text` has one of the names."""
        parts = _parts(text)
        return any(
            parts[start : start + length] in self._names
            for start, part in enumerate(parts)
            for length in self._lengths.get(part, ())
        )


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def tells(entry: Any, names: Names, kept: set[str]) -> bool:
    """Whether an entry of `rejected` names something that went. A kept clip's source is no hint, whatever it is
    called."""
    if isinstance(entry, Mapping) and entry.get("source") in kept:
        entry = {key: value for key, value in entry.items() if key != "source"}
    return any(map(names.are_in, texts(entry)))


def without(value: Any, names: Names) -> Any:
    """A JSON value without the fields and items that are, or are called, something that went."""

    def bad(item: Any) -> bool:
        return isinstance(item, str) and names.are_in(item)

    if isinstance(value, Mapping):
        return {key: without(item, names) for key, item in value.items() if not bad(key) and not bad(item)}
    if isinstance(value, list | tuple):
        return [without(item, names) for item in value if not bad(item)]
    return value


def _parts(text: str) -> tuple[str, ...]:
    return tuple(_PART.findall(text.casefold()))
