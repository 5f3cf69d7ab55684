"""`dualforce data`: what each command prints, its exit codes, and bad input as one line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.people_shards import file_bytes, read_clips, write_people
from helpers.shard_edits import age, rewrite, rewrite_manifest

from data_shards.reader import ShardSet
from dualforce import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `dualforce data ARGS`; returns the exit code and what it wrote to stdout and stderr."""

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dualforce", "data", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        return int(left.value.code or 0), written.out, written.err

    return call


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three tars of train (one clip each) and one of validation."""
    rejected = [
        {"source": f"{n}.mp4", "reason": reason, "detail": "-"}
        for n, reason in enumerate(("R_CUT", "R_SHORT", "R_CUT"))
    ]
    return write_people(
        tmp_path / "set", train=("ann", "bob", "dan"), clips=1, shard_bytes=1, rejected=rejected, flame=True, text_dim=5
    )


@pytest.mark.parametrize(
    "arguments",
    [("verify", "URL"), ("inspect", "URL", "key"), ("stats", "URL"), ("split", "URL", "out", "--validation", "0.5"),
     ("drop", "URL", "out", "--key", "a"), ("drop", "set", "URL", "--key", "a"), ("merge", "out", "set", "URL"),
     ("merge", "URL", "set", "set"), ("upgrade", "URL", "out"), ("upgrade", "set", "URL"),
     ("build", "set", "--out", "URL")],
)  # fmt: skip
def test_a_url_is_told_from_a_folder(root: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    """As it was given, but without its secrets; and none becomes a folder called "https:"."""
    monkeypatch.chdir(root.parent)
    code, out, err = run(*("https://me:pass@host/set?key=1" if one == "URL" else one for one in arguments))
    assert code == 2 and out == ""
    assert err == "error: https://host/set: a URL: expected a folder of this machine\n"
    assert [path.name for path in root.parent.iterdir()] == ["set"]


def damage(tar: Path, text: bytes = b"licence") -> None:
    data = bytearray(tar.read_bytes())
    data[data.index(text)] ^= 1
    tar.write_bytes(data)


def damage_padding(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1
    tar.write_bytes(data)


# verify


@pytest.mark.parametrize("options", [(), ("--samples",)])
def test_whole_set_has_no_fault(root: Path, run: Run, options: tuple[str, ...]) -> None:
    before = file_bytes(root)
    clips = 4 if options else 0
    assert run("verify", root, *options) == (0, f"0 faults: 9 files and {clips} clips checked\n", "")
    assert file_bytes(root) == before


def test_damage_is_listed_completely(root: Path, run: Run, tmp_path: Path) -> None:
    damage(root / "train-000000.tar")
    damage(root / "validation-000000.tar")
    code, out, err = run("verify", root, "--json", tmp_path / "f.json")
    lines = out.splitlines()
    assert code == 1 and err == "" and lines[2:] == ["2 faults: 9 files and 0 clips checked"]
    assert [line.split(": ")[0] for line in lines[:2]] == [
        str(root / f"{n}-000000.tar") for n in ("train", "validation")
    ]
    found = json.loads((tmp_path / "f.json").read_text())
    assert [fault["file"] for fault in found["faults"]] == ["train-000000.tar", "validation-000000.tar"]

    code, out, _ = run("verify", root, "--samples", "--json", tmp_path / "f.json")
    lines = out.splitlines()
    assert code == 1 and lines[2:] == ["2 faults: 9 files and 4 clips checked"]
    assert lines[0].startswith(f"{root}/train-000000.tar: sample 'ann-w0': ")
    assert lines[1].startswith(f"{root}/validation-000000.tar: sample 'cyd-w0': ")
    found = json.loads((tmp_path / "f.json").read_text())
    places = [(fault["file"], fault["sample"], fault["text"]) for fault in found["faults"]]
    assert places == [("train-000000.tar", "ann-w0", lines[0]), ("validation-000000.tar", "cyd-w0", lines[1])]


def test_a_report_that_cannot_be_written_is_said_before_anything_is_read(
    root: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.check.find_faults", lambda *_, **__: pytest.fail("read"))
    for path, reason in ((tmp_path / "none" / "f.json", "No such file or directory"), (tmp_path, "Is a directory")):
        line = f"error: --json {path}: {reason}: expected a file that can be written\n"
        assert run("verify", root, "--json", path) == (2, "", line)


def test_two_clips_of_one_tar_and_damage_between_clips(tmp_path: Path, run: Run) -> None:
    root = write_people(tmp_path / "set", clips=2)
    for text in (b'"key": "ann-w1"', b'"key": "bob-w0"'):
        damage(root / "train-000000.tar", text)
    damage_padding(root / "validation-000000.tar")
    code, out, _ = run("verify", root, "--samples")
    lines = out.splitlines()
    assert code == 1 and len(lines) == 4 and lines[3].startswith("3 faults")
    assert "validation-000000.tar: sha256" in lines[0] and "'ann-w1'" in lines[1] and "'bob-w0'" in lines[2]


def test_missing_short_and_changed_files(root: Path, run: Run) -> None:
    (root / "train-000000.tar").unlink()
    (root / "train-000001.tar").write_bytes((root / "train-000001.tar").read_bytes()[:-512])
    (root / "train-000002.sums.safetensors").write_text("{}")
    code, out, _ = run("verify", root, "--samples")
    lines = out.splitlines()
    assert code == 1 and len(lines) == 4
    assert lines[0] == f"{root}/train-000000.tar: missing: expected the file that manifest.json lists"
    assert f"{root}/train-000001.tar: " in lines[1] and "bytes: expected" in lines[1]
    assert f"{root}/train-000002.sums.safetensors: 2 bytes: expected" in lines[2]
    assert lines[3].startswith("3 faults") and "no clip was read" in lines[3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["splits"]["train"].update(samples=7), "those of 8 samples in 4 shards, as in the manifest"),
        (lambda m: m.pop("statistics"), "statistics: absent"),
        (lambda m: m["files"]["train-000000.tar"].pop("sha256"), "files.train-000000.tar.sha256: None"),
        (lambda m: m["files"].pop("train-000000.tar"), "files.train-000000.tar: absent"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": 64 * "0"}}), "expected the name of a file"),
    ],
)
def test_manifest_that_disagrees_is_damage(root: Path, run: Run, change: Callable[[Any], Any], named: str) -> None:
    rewrite_manifest(root, change)
    code, out, _ = run("verify", root)
    assert code == 1 and len(out.splitlines()) == 2 and named in out


def test_a_manifest_written_anew_is_not_the_one_that_was_written(root: Path, run: Run) -> None:
    """It can be opened, as its indexes and tars agree with it; who wrote it, nobody can tell."""
    rewrite(root / "manifest.json", lambda manifest: manifest.update(info={}))
    code, out, _ = run("verify", root)
    assert code == 1 and out.splitlines()[0].startswith(f"{root / 'manifest.json'}: sha256: ")


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}", '{"shard_version": 999, "files": {}}'])
def test_folder_that_is_no_set(tmp_path: Path, run: Run, text: str | None) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    for command in (("verify",), ("inspect",), ("stats",)):
        code, out, err = run(*command, tmp_path)
        assert code == 2 and out == "" and err.startswith(f"error: {tmp_path}/manifest.json: ")
        assert len(err.splitlines()) == 1


def test_report_does_not_go_into_the_set(root: Path, run: Run) -> None:
    before = file_bytes(root)
    code, _, err = run("verify", root, "--json", root / "manifest.json")
    assert code == 2 and "inside the shard set" in err and file_bytes(root) == before


# inspect


def table(text: str) -> dict[str, str]:
    """Lines of a title and a value, at least two spaces apart."""
    return dict(re.split(r"  +", line) for line in text.splitlines())  # type: ignore[misc]


def test_inspect_a_set(root: Path, run: Run) -> None:
    code, out, _ = run("inspect", root)
    assert code == 0
    rows = table(out)
    size = (root / "validation-000000.tar").stat().st_size
    assert rows["shard version"] == str(ShardSet.open(root).manifest["shard_version"])
    assert rows["tag of motion"] == "random-motion-v1 (width 8)"
    assert rows["tag of flame"] == "random-flame-v1 (width 56)" and "tag of text" in rows
    assert rows["size"] == "16 x 4 x 4 latents, pixel size 32"
    assert rows["frames"] == "3 latent, 9 pixel frames a clip"
    assert rows["video"] == "0.000 hours (1.44 s in 4 clips)"
    assert rows["train"].startswith("3 samples, 3 identities, ") and rows["train"].endswith(" bytes in 3 shards")
    assert rows["validation"] == f"1 samples, 1 identities, {size} bytes in 1 shards"
    audio = ShardSet.open(root).manifest["statistics"]["audio"]
    mean, std = (f"{min(audio[key]):.4g} to {max(audio[key]):.4g}" for key in ("mean", "std"))
    assert rows["statistics of audio"] == f"mean {mean}, std {std}"
    assert rows["rejected R_CUT"] == "2" and rows["rejected R_SHORT"] == "1"
    assert "licence" not in out
    assert table(run("inspect", root, "--deep")[1]) == rows | {"licence CC0-1.0": "4"}


def test_inspect_a_clip(root: Path, run: Run) -> None:
    code, out, _ = run("inspect", root, "cyd-w0")
    assert code == 0
    clip = read_clips(root)["validation"][0]
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "validation" in rows["split"] and rows["identity"].endswith(" cyd")
    numbers = clip.struct.double()
    expected = f"{numbers.min():.5g} {numbers.mean():.5g} {numbers.max():.5g} 0".split()
    assert rows["struct"].split() == ["struct", "[3,", "4,", "8]", "float32", *expected]
    assert {"video", "reference", "audio", "voiced", "flame", "flame_valid", "text"} <= rows.keys()
    assert json.loads(out[out.index("\nmeta\n") + 6 :]) == clip.meta


def test_inspect_a_clip_that_is_not_there_or_damaged(root: Path, run: Run) -> None:
    code, _, err = run("inspect", root, "cyd-w1")
    assert code == 2 and err.endswith("key 'cyd-w1': expected one of the set's 4 (nearest: 'cyd-w0')\n")
    damage(root / "validation-000000.tar")
    code, out, err = run("inspect", root, "cyd-w0")
    assert code == 2 and out == "" and "damaged data" in err


# stats


def add(values: list[float], place: int, amount: float) -> None:
    values[place] += amount


def test_statistics_that_agree(root: Path, run: Run) -> None:
    code, out, _ = run("stats", root)
    assert code == 0
    streams = ("audio", "flame", "struct", "video")
    assert [line.split(": ")[:2] for line in out.splitlines()] == [[stream, "agrees"] for stream in streams]
    rewrite_manifest(root, lambda m: add(m["statistics"]["video"]["mean"][1], 3, 1e-9))
    code, out, _ = run("stats", root)
    assert code == 0 and "video: agrees: largest difference" in out and "at mean [1, 3]" in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: add(s["struct"]["std"], 2, 1e-4), "struct: differs: largest difference 0.0001 at"),
        (lambda s: s["audio"]["mean"].__setitem__(0, 5.0), "at mean [0] (manifest 5, clips -"),
        (lambda s: s["audio"]["mean"].pop(), "audio: differs: mean of shape [11]: expected [12]"),
        (lambda s: s["audio"].update(mean="x"), "audio: differs: expected numbers under mean and std"),
        (lambda s: s.pop("audio"), "audio: differs: only in the clips"),
        (lambda s: s.update(smell=s["audio"]), "smell: differs: only in the manifest"),
    ],
)  # fmt: skip
def test_statistics_that_differ(root: Path, run: Run, change: Callable[[Any], Any], named: str) -> None:
    rewrite_manifest(root, lambda m: change(m["statistics"]))
    code, out, _ = run("stats", root)
    assert code == 1 and named in out and out.count("differs") == 1


# merge, split, drop


def test_merge_split_drop(root: Path, tmp_path: Path, run: Run) -> None:
    other = write_people(tmp_path / "other", train=("eva",), validation=("fay",), flame=True, text_dim=5)
    merged, dealt, left = (tmp_path / name for name in ("merged", "dealt", "left"))
    code, out, _ = run("merge", merged, root, other)
    assert (code, out) == (0, f"{merged}: 4 identities and 5 clips in train, 2 identities and 3 clips in validation\n")
    code, out, _ = run("split", merged, dealt, "--validation", 0.5, "--seed", 3)
    assert code == 0 and out.startswith(f"{dealt}: ")
    assert sum(len(clips) for clips in read_clips(dealt).values()) == 8
    code, out, _ = run("drop", dealt, left, "--identity", "ann", "--identity", "eva", "--key", "fay-w0")
    assert (code, out) == (0, "4 clips dropped, 4 kept; 0 entries of rejected removed\n")
    assert run("verify", left, "--samples")[0] == 0 and run("stats", left)[0] == 0
    assert {clip.key for clips in read_clips(left).values() for clip in clips} == {
        "bob-w0",
        "cyd-w0",
        "dan-w0",
        "fay-w1",
    }


def test_merge_with_prefix(root: Path, tmp_path: Path, run: Run) -> None:
    other = write_people(
        tmp_path / "other", train=("ann",), clips=2, sources={"ann": "2.mp4", "cyd": "3.mp4"}, flame=True, text_dim=5
    )
    assert run("merge", tmp_path / "out", root, other, "--prefix")[0] == 0
    assert ShardSet.open(tmp_path / "out").split("train").keys[-1] == "2-ann-w1"


def test_drop_warns_of_kept_clips_that_name_the_person(tmp_path: Path, run: Run) -> None:
    root = write_people(tmp_path / "set", clips=1, sources={"ann": "ann and bob.mp4"})
    code, _, err = run("drop", root, tmp_path / "out", "--identity", "bob")
    assert code == 0 and err.startswith("warning: kept clip 'ann-w0' names something that was dropped")


def test_upgrade(tmp_path: Path, run: Run) -> None:
    new = write_people(tmp_path / "new")
    old = age(write_people(tmp_path / "old"), 1)
    code, _, err = run("verify", old)
    assert code == 2 and "upgrade" in err
    code, out, _ = run("upgrade", old, tmp_path / "out")
    assert (
        code == 0
        and out == f"{tmp_path}/out: 2 identities and 4 clips in train, 1 identities and 2 clips in validation\n"
    )
    assert file_bytes(tmp_path / "out") == file_bytes(new)
    code, _, err = run("upgrade", new, tmp_path / "again")
    assert code == 2 and len(err.splitlines()) == 1


BAD: dict[str, tuple[list[str], str]] = {
    "merge-one": (["merge", "OUT", "SET"], "1 shard sets to merge: expected at least 2"),
    "merge-keys": (["merge", "OUT", "SET", "COPY"], "key: ann-w0: expected one that"),
    "merge-none": (["merge", "OUT", "SET", "NONE"], "NONE/manifest.json: missing"),
    "merge-out": (["merge", "COPY", "SET", "SET"], "COPY: exists: expected a new folder"),
    "split-share": (["split", "SET", "OUT", "--validation", "1.5"], "validation share 1.5: expected more than 0"),
    "split-side": (["split", "SET", "OUT", "--validation", "1e-9"], "none of 4 identities falls to validation"),
    "split-inside": (["split", "SET", "SET/new", "--validation", "0.5"], "inside the shard set"),
    "split-none": (["split", "NONE", "OUT", "--validation", "0.5"], "NONE/manifest.json: missing"),
    "drop-nothing": (["drop", "SET", "OUT"], "nothing to drop"),
    "drop-unknown": (["drop", "SET", "OUT", "--identity", "anne"], "one of the set's 4 (nearest: 'ann'"),
    "drop-key": (["drop", "SET", "OUT", "--key", "ann"], "key 'ann': expected one of the set's 4"),
    "upgrade-exists": (["upgrade", "SET", "COPY"], "COPY: exists: expected a new folder"),
    "upgrade-inside": (["upgrade", "SET", "SET/new"], "inside the shard set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(root: Path, tmp_path: Path, run: Run, case: str) -> None:
    write_people(tmp_path / "COPY", clips=2, flame=True, text_dim=5)
    root.rename(tmp_path / "SET")
    before = sorted(tmp_path.rglob("*"))
    words, message = BAD[case]
    paths = ("SET", "OUT", "COPY", "NONE")
    code, out, err = run(*(tmp_path / word if word.split("/")[0] in paths else word for word in words))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(rejected={}), "rejected: {}"),
        (lambda m: m.update(info=[]), "info: []"),
        (lambda m: m.update(statistics=[]), "statistics: []"),
        (lambda m: m["splits"]["train"].update(identities=3), "splits.train.identities: 3"),
    ],
)
def test_manifest_of_another_form(
    root: Path, tmp_path: Path, run: Run, change: Callable[[Any], Any], named: str
) -> None:
    rewrite_manifest(root, change)
    other, out = (
        write_people(tmp_path / "other", train=("eva",), validation=(), flame=True, text_dim=5),
        tmp_path / "out",
    )
    for command in (
        ("inspect", root),
        ("stats", root),
        ("merge", out, other, root),
        ("split", root, out, "--validation", 0.5),
        ("drop", root, out, "--key", "ann-w0"),
    ):
        code, _, err = run(*command)
        assert code == 2 and err.startswith(f"error: {root}/manifest.json: {named}: expected") and err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("change", [lambda m: m.update(statistics={"audio": 3}), lambda m: m.update(rejected=["x"])])
def test_inspect_of_a_manifest_that_only_opens(root: Path, run: Run, change: Callable[[Any], Any]) -> None:
    rewrite_manifest(root, change)
    code, out, err = run("inspect", root)
    assert code == 2 and out == "" and "expected the manifest of a shard set" in err and len(err.splitlines()) == 1


def test_names_do_not_reach_the_terminal_raw(tmp_path: Path, run: Run) -> None:
    odd = "a\x1b[2J\udc80\u2028 \u00e4"
    root = write_people(tmp_path / "set", clips=1, sources={"ann": odd}, rejected=[{"source": "x", "reason": odd}])
    shown = "a\\x1b[2J\\udc80\\u2028 \\xe4"
    assert f"rejected {shown}  1" in run("inspect", root)[1]
    assert shown.replace("\\x1b", "\\\\u001b") in run("inspect", root, "ann-w0")[1]
    rewrite_manifest(root, lambda m: m["files"].update({odd: {"bytes": 1, "sha256": 64 * "0"}}))
    code, out, _ = run("verify", root)
    assert code == 1 and f"files: {odd!r}: expected" in out


def test_manifest_that_is_a_pipe(root: Path, run: Run) -> None:
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")
    for command in (("verify",), ("inspect",), ("stats",)):
        code, _, err = run(*command, root)
        assert code == 2 and len(err.splitlines()) == 1 and "expected a plain file" in err


def test_links_and_pipes_are_not_read(root: Path, run: Run) -> None:
    (root / "train-000000.tar").rename(root / "elsewhere")
    (root / "train-000000.tar").symlink_to(root / "elsewhere")
    (root / "train-000001.tar").unlink()
    os.mkfifo(root / "train-000001.tar")
    code, out, _ = run("verify", root)
    lines = out.splitlines()
    assert code == 1 and len(lines) == 3
    assert [line.split(": ")[1] for line in lines[:2]] == ["expected a plain file, not a link, folder or pipe"] * 2


@pytest.mark.parametrize("args", [["split", "SET", "OUT"], ["verify"], ["merge", "OUT"], ["nonsense"]])
def test_arguments_that_are_missing(run: Run, args: list[str]) -> None:
    assert run(*args)[0] == 2


@pytest.mark.parametrize("command", ["build", "verify", "inspect", "stats", "merge", "split", "drop", "upgrade"])
def test_every_command_has_help(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and command in out
