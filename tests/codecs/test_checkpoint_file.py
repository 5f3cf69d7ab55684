"""Checkpoints: what is read of them, and that hostile ones are one line and nothing happens."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dualforce.codecs.checkpoint_file import fill, read_checkpoint
from dualforce.codecs.protocols import CodecError

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


class Touch:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._path),)


def zipped(content: bytes) -> bytes:
    """An archive as torch writes it, its parts compressed."""
    given, made = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in given.namelist():
            archive.writestr(member, given.read(member))
    return made.getvalue()


def overlapping(content: bytes) -> bytes:
    """An archive whose directory names each part fifty times: what it unpacks to has no end."""
    made = io.BytesIO(content)
    with zipfile.ZipFile(made, "a") as archive:
        for member in archive.infolist() * 50:
            again = copy.copy(member)
            again.filename += str(len(archive.filelist))
            archive.filelist.append(again)
        archive.writestr("end", b"")
    return made.getvalue()


def saved(value: object, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def hostile(trap: Path) -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "expected a checkpoint of plain tensors"),
        "text": (b"<html>moved</html>", "expected a checkpoint of plain tensors"),
        "cut": (saved(WEIGHTS)[:700], "expected a checkpoint of plain tensors"),
        "cut-old": (saved(WEIGHTS, old=True)[:300], "expected a checkpoint of plain tensors"),
        "code": (saved({"a": torch.zeros(1), "b": Touch(trap)}), "expected a checkpoint of plain tensors"),
        "code-old": (saved(Touch(trap), old=True), "expected a checkpoint of plain tensors"),
        "code-pickle": (pickle.dumps(Touch(trap)), "expected a checkpoint of plain tensors"),
        "module": (saved(nn.Linear(2, 2)), "expected a checkpoint of plain tensors"),
        "zip": (zipped(saved(WEIGHTS)), "members are compressed or overlap"),
        "overlap": (overlapping(saved({"a": torch.zeros(9999)})), "members are compressed or overlap"),
        "tar": (tarred(), "expected a checkpoint of plain tensors"),
        "no-tensor": (saved({"a": 1, "b": [torch.zeros(1)]}), "no tensors in it"),
        "list": (saved([torch.zeros(1)]), "no tensors in it"),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(hostile(Path())))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_hostile_files_are_one_line(tmp_path: Path, name: str, suffix: str) -> None:
    trap = tmp_path / "trap"
    content, message = hostile(trap)[name]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CodecError, match=message if suffix == ".pth" else "expected a checkpoint") as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300 and not trap.exists()


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(CodecError, match=f"^{path}: not a file: expected a checkpoint"):
            read_checkpoint(path)


def test_tensors_by_their_full_name(tmp_path: Path) -> None:
    nested = {"epoch": 3, "state": {"a.b": WEIGHTS, "x": None, 7: torch.zeros(1)}, "top": torch.ones(1)}
    torch.save(nested, tmp_path / "new.pth")
    (tmp_path / "old.tar").write_bytes(saved(nested, old=True))
    for name in ("new.pth", "old.tar"):
        found = read_checkpoint(tmp_path / name)
        assert set(found.tensors) == {"state.a.b.weight", "state.a.b.bias", "top"}
        assert torch.equal(found.below("state.a.b.")["weight"], WEIGHTS["weight"])
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    assert set(read_checkpoint(tmp_path / "x.safetensors").tensors) == set(WEIGHTS)


def test_an_object_in_many_places_is_gone_through_once(tmp_path: Path) -> None:
    """Else the few bytes of this file would be a billion names."""
    content: dict[str, object] = {"tensor": torch.ones(1)}
    for _ in range(3):
        content = {str(number): content for number in range(1000)}
    torch.save(content, tmp_path / "x.pth")
    assert set(read_checkpoint(tmp_path / "x.pth").tensors) == {"0.0.0.tensor"}


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(saved(WEIGHTS))
    (tmp_path / "b.pth").write_bytes(saved(WEIGHTS))
    (tmp_path / "c.pth").write_bytes(saved({**WEIGHTS, "bias": torch.zeros(2)}))
    a, b, c = (read_checkpoint(tmp_path / f"{name}.pth").digest for name in "abc")
    assert a == b != c and len(a) == 12


def linear() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_module_takes_copies_in_its_own_type(dtype: torch.dtype) -> None:
    module, given = linear(), {name: x.to(dtype, copy=True) for name, x in WEIGHTS.items()}
    fill(module, given, Path("x"), "")
    given["bias"].zero_()
    assert module.bias.tolist() == [1, 2] and module.weight.dtype == torch.float32
    assert not module.training and not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(1).expand(2**40, 3), r"shape \[1099511627776, 3\]: expected \[2, 3\]"),
        (torch.zeros(2, 3, device="meta"), "on meta: expected plain"),
        (torch.zeros(2, 3).to_sparse(), "sparse"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 3, dtype=torch.bool), "bool"),
        (torch.full((2, 3), float("inf")), "NaN or infinity"),
        (torch.full((2, 3), 1e300, dtype=torch.float64), "NaN or infinity"),
    ],
)
def test_unfit_weights_are_named(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(CodecError, match=rf"^f\.pth: net\.weight: .*{message}") as caught:
        fill(linear(), {**WEIGHTS, "weight": weight}, Path("f.pth"), "net.")
    assert "\n" not in str(caught.value)
