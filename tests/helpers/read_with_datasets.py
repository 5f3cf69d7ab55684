"""Reads a shard set with Hugging Face `datasets` and writes what came out; run in a process of its own.

    python -m helpers.read_with_datasets SET OUT stream|store

OUT gets KEY.safetensors and KEY.json for every clip. The process ends with an error when anything asks for the network
or unpickles.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Json, Value

FIELDS = Features({"__key__": Value("string"), "json": Json(), "safetensors": Value("binary")})
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "subprocess.Popen", "os.system")


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event in FORBIDDEN:
        raise RuntimeError(f"forbidden: {event} {arguments}")


def main(root: Path, out: Path, way: str) -> None:
    sys.addaudithook(forbid)
    tars = {split: sorted(str(path) for path in root.glob(f"{split}-*.tar")) for split in ("train", "validation")}
    found = datasets.load_dataset(
        "webdataset", data_files=tars, features=FIELDS, streaming=way == "stream", cache_dir=str(out / "cache")
    )
    for split in tars:
        for sample in found[split]:
            assert sample.keys() == FIELDS.keys(), sample.keys()
            assert type(sample["safetensors"]) is bytes
            (out / f"{sample['__key__']}.safetensors").write_bytes(sample["safetensors"])
            (out / f"{sample['__key__']}.json").write_text(json.dumps(sample["json"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
