"""Names in texts: whole ones, and the same whatever number of names is looked for."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.mentions import Names, tells, without

TEXTS = st.text(alphabet="aAbB12_-. ", max_size=12)


def defined(name: str, text: str) -> bool:
    """The definition: where letters do not go on as letters, nor digits as digits."""

    def edge(character: str) -> str:
        return r"[0-9]" if character.isdigit() else r"[a-zA-Z]" if character.isalpha() else r"(?!)"

    pattern = f"(?<!{edge(name[0])}){re.escape(name)}(?!{edge(name[-1])})"
    return re.search(pattern, text, re.IGNORECASE) is not None


@settings(max_examples=500, deadline=None)
@given(st.lists(TEXTS.filter(bool), max_size=4), TEXTS)
def test_whole_names_are_found(names: list[str], text: str) -> None:
    assert Names(names).are_in(text) == any(defined(name, text) for name in names)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("id1", "id1.mp4", True), ("id1", "my_ID1b", True), ("id1", "id10", False), ("id1", "paid1", False),
        ("stra\u00dfe", "eine STRASSE 7", True), ("\u00e9va", "\u00c9VA.mp4", True), ("a\nb", "x a\nb", True),
        ("\u5f20\u4f1f", "\u5f20\u4f1f_1.mp4", True), ("\ud800", "x\ud800", True),
    ],
)  # fmt: skip
def test_capital_letters_and_other_scripts(name: str, text: str, found: bool) -> None:
    assert Names([name, "nobody"]).are_in(text) == found


def test_many_names_are_told_from_their_neighbours() -> None:
    names = Names(f"clip-{number:05d}-w0" for number in range(0, 20_000, 2))
    found = [number for number in range(300) if names.are_in(f"see clip-{number:05d}-w0.mp4")]
    assert found == list(range(0, 300, 2))


def test_no_names_are_nowhere() -> None:
    assert not Names([]).are_in("anything") and without({"a": ["b"]}, Names([])) == {"a": ["b"]}
    assert not tells({"source": "a.mp4", "n": 1}, Names([]), set())
