"""The manifest of a checkpoint: what is not as it was written is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import IO, cast

import pytest
import torch
from helpers.checkpoint_folder import seal
from helpers.full_disk import full_after
from xxhash import xxh3_64_hexdigest

from dualforce.config import ConfigError
from dualforce.train import manifest
from dualforce.train.manifest import FileSum, SummedFile, check_share, read_manifest, shares, sum_of, write_file


def make(folder: Path, sizes: dict[str, int]) -> dict[str, FileSum]:
    for number, (name, size) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((number + i) % 251 for i in range(size)))
    return seal(folder)


def test_the_sum_is_of_the_bytes_that_were_handed_over(tmp_path: Path) -> None:
    """Of those that torch.save hands over in pieces; and of what is read in blocks."""
    path, content = tmp_path / "a.pt", {"x": torch.arange(300_000), "y": [torch.ones(3), "text"]}
    found = write_file(path, lambda file: torch.save(content, cast(IO[bytes], file)))
    data = path.read_bytes()
    assert found == sum_of(path) == FileSum(len(data), xxh3_64_hexdigest(data))
    assert torch.equal(torch.load(path, weights_only=True)["x"], content["x"])  # type: ignore[arg-type]


def test_blocks_do_not_change_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    whole = sum_of(tmp_path / "a")
    monkeypatch.setattr(manifest, "BLOCK", 1000)
    assert sum_of(tmp_path / "a") == whole


def test_a_write_that_went_wrong_shows(tmp_path: Path) -> None:
    """The disk takes other bytes than it was given: a sum of what is read back would call them right."""

    def faulty(file: SummedFile) -> None:
        given = file._file
        file._file = cast(IO[bytes], SimpleNamespace(write=lambda data: given.write(bytes(data)[:-1] + b"?")))
        file.write(b"weights")

    files = {"a.pt": write_file(tmp_path / "a.pt", faulty)}
    assert (tmp_path / "a.pt").read_bytes() == b"weight?"
    with pytest.raises(ConfigError, match=r"a\.pt: xxh3 .* as written \(damaged data\)"):
        check_share(tmp_path, files, 0, 1)


@pytest.mark.parametrize("room", [0, 100, 700, 20_000])
def test_a_full_disk_is_one_line(tmp_path: Path, room: int) -> None:
    """torch.save tells of its own state in place of the disk's error, unless the very first byte failed."""
    with full_after(room), pytest.raises(ConfigError) as error:
        write_file(tmp_path / "a.pt", lambda file: torch.save(torch.zeros(50_000), cast(IO[bytes], file)))
    assert str(error.value) == f"{tmp_path / 'a.pt'}: cannot be written: No space left on device"


def test_a_file_of_another_size_and_none_say_so(tmp_path: Path) -> None:
    """Without being read."""
    files = make(tmp_path, {"a.pt": 9, "b.pt": 9})
    (tmp_path / "a.pt").write_bytes(b"longer than that")
    with pytest.raises(ConfigError, match=r"a\.pt: 16 bytes: expected 9, as written \(damaged data\)"):
        check_share(tmp_path, files, 0, 2)
    (tmp_path / "b.pt").unlink()
    with pytest.raises(ConfigError, match=r"b\.pt: no such file; expected the files of every rank of the checkpoint"):
        check_share(tmp_path, files, 1, 2)


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    def wrong(file: SummedFile) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        write_file(tmp_path / "a", wrong)
    with pytest.raises(ConfigError, match=r"nowhere/a: cannot be written: No such file or directory"):
        write_file(tmp_path / "nowhere" / "a", lambda file: file.write(b""))


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    files = make(tmp_path, {"b.pt": 3, "a/c.bin": 0})
    assert read_manifest(tmp_path) == files
    path = tmp_path / "manifest.json"
    text = path.read_bytes()
    changed = [bytes([*text[:i], text[i] ^ (1 << bit), *text[i + 1 :]]) for i in range(len(text)) for bit in range(8)]
    for wrong in (*changed, b"", b"[]", b"{}", b"[" * 100_000, text + b"\n", text[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"manifest\.json: not as it was written") as error:
            read_manifest(tmp_path)
        assert "\n" not in str(error.value)
    values = json.loads(text)
    values["files"].pop("b.pt")
    path.write_text(json.dumps(values, indent=1) + "\n")  # well formed, but not what was sealed
    with pytest.raises(ConfigError, match="not as it was written"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json: no such file; expected a complete checkpoint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_work(world: int) -> None:
    """Each file once; the busiest rank has at most the largest file more than an even share (Graham's bound)."""
    files = {f"{i}.pt": FileSum(size, "") for i, size in enumerate([900, 10, 350, 350, 340, 20, 0, 700])}
    found = shares(files, world)
    assert sorted(name for of in found for name in of) == sorted(files)
    loads = [sum(files[name].size for name in of) for of in found]
    assert max(loads) <= sum(loads) / world + 900
    assert world > len(files) or sum(load > 0 for load in loads) == min(world, 7)


def test_a_file_too_many_is_named(tmp_path: Path) -> None:
    """DeepSpeed's converter takes every file of a pattern for one of the checkpoint."""
    files = make(tmp_path, {"zero_pp_rank_0.pt": 9})
    check_share(tmp_path, files, 0, 1)
    (tmp_path / "zero_pp_rank_1.pt").write_bytes(b"of another run")
    for rank in range(2):
        with pytest.raises(ConfigError, match=r"zero_pp_rank_1\.pt: not in manifest\.json: expected the files of this"):
            check_share(tmp_path, files, rank, 2)


def test_an_unfinished_checkpoint_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints" / "step-000002"
    for number in range(3):
        manifest.begin_folder(folder)
        assert list(folder.iterdir()) == []
        (folder / f"{number}.pt").touch()
    assert [(tmp_path / "checkpoints" / f"step-000002.torn-{n}" / f"{n - 1}.pt").exists() for n in (1, 2)] == [True] * 2
    assert caplog.text.count("was there before, unfinished or of another attempt: kept as step-000002.torn-") == 2
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"step-000004: cannot be made: Not a directory"):
        manifest.begin_folder(tmp_path / "file" / "step-000004")
