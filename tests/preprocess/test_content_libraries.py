"""Every library that the stages run on counts for the name of a result."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from dualforce import codecs, preprocess
from dualforce.preprocess.content_id import LIBRARIES

# What has no say in the numbers: files of tensors, pages, bars, and the errors of ONNX's parser.
APART = {"safetensors", "jinja2", "rich", "google"}
OPENERS = ("_module", "import_module")


def modules_of(path: Path) -> Iterator[str]:
    """Top-level names of all that a file imports, by statement or by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in OPENERS:
            yield from (word.value.split(".")[0] for word in node.args[:1] if isinstance(word, ast.Constant))


def test_every_library_of_the_stages_counts() -> None:
    files = [path for package in (codecs, preprocess) for path in Path(package.__path__[0]).rglob("*.py")]
    used = {name for path in files for name in modules_of(path)}
    used -= {*sys.stdlib_module_names, *APART, "dualforce", "data_shards", "megatron_ext"}
    assert {"torch", "av", "tokenizers", "transformers"} <= used
    known = packages_distributions()
    missing = {name for name in used if not {name.replace("_", "-"), *known.get(name, ())} & set(LIBRARIES)}
    assert missing == set()
