"""Kept results: what is broken is made again, what only cannot be read now stays."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dualforce.preprocess.work import RECORD, find_result

RECORD_TEXT = json.dumps({"samples": [], "rejected": [], "length": 1.5, "files": {"clip.json": [2, 0]}})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One result, "one"."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "clip.json").write_text("{}")
    (tmp_path / "one" / RECORD).write_text(RECORD_TEXT)
    return tmp_path


def test_a_whole_one_is_found(results: Path) -> None:
    found = find_result(results, "one")
    assert found is not None and found.length == 1.5 and find_result(results, "two") is None


@pytest.mark.parametrize("record", [None, "", "[]", "{}", RECORD_TEXT.replace("[2, 0]", "[3, 0]"),
                                    RECORD_TEXT.replace('{"clip.json": [2, 0]}', "[]")])  # fmt: skip
def test_a_broken_one_is_removed(results: Path, record: str | None) -> None:
    if record is None:
        (results / "one" / "clip.json").unlink()
    else:
        (results / "one" / RECORD).write_text(record)
    assert find_result(results, "one") is None and not (results / "one").exists()


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_one_that_cannot_be_read_now_stays(results: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    def fail(path: Path, **_: Any) -> str:
        raise OSError(fault, os.strerror(fault), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(OSError, match=os.strerror(fault)):
            find_result(results, "one")
    assert find_result(results, "one") is not None
