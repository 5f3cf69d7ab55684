"""Rules of the tree that reading the source can check: who imports whom, no pickle, no hidden state."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("dualforce", "megatron_ext", "data_shards")

# What each part may import of the project, beside itself. The longest prefix that fits a module counts.
BASE = (
    "dualforce.types",
    "dualforce.config",
    "dualforce.config_errors",
    "dualforce.config_file",
    "dualforce.presets",
    "dualforce.reused",
)
MIDDLE = tuple(f"dualforce.{name}" for name in ("model", "diffusion", "losses", "data", "codecs"))
BOTTOM = ("megatron_ext", "data_shards")
TOP = tuple(f"dualforce.{name}" for name in ("train", "generate", "weights", "preprocess"))
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "megatron_ext": (),
    "data_shards": (),
    "dualforce": (),
    "dualforce.types": (),
    "dualforce.config_errors": (),
    "dualforce.config": ("dualforce.types", "dualforce.config_errors"),
    "dualforce.config_file": ("dualforce.config",),
    "dualforce.presets": ("dualforce.types", "dualforce.config"),
    "dualforce.reused": ("data_shards",),
    "dualforce.launch": (*BASE, "megatron_ext"),
    "dualforce.model": (*BASE, "megatron_ext"),
    "dualforce.diffusion": BASE,
    "dualforce.losses": BASE,
    "dualforce.data": (*BASE, "data_shards"),
    "dualforce.codecs": BASE,
    **dict.fromkeys(TOP, (*BASE, *MIDDLE, *BOTTOM, "dualforce.launch", "dualforce")),
    "dualforce.data_commands": ("data_shards", "dualforce.preprocess"),
    "dualforce.__main__": ("dualforce.cli", "dualforce"),
    "dualforce.cli": (*BASE, *MIDDLE, *BOTTOM, *TOP, "dualforce.launch", "dualforce.data_commands", "dualforce"),
    "tools": (*BASE, *MIDDLE, *BOTTOM, *TOP, "dualforce.launch", "dualforce.cli", "dualforce"),
}

# Optional packages: imported in one file each, or in the files of one package, inside a function.
OPTIONAL = (
    "av", "mediapipe", "soundfile", "transformers", "diffusers", "cv2", "insightface", "flash_attn", "scenedetect",
    "silero_vad", "fsspec",
)  # fmt: skip
PLACES = {"dualforce/codecs/media": "dualforce/codecs/media"}  # packages that count as one place
CONTRACT_NEEDS = {"numpy", "torch", "safetensors", "webdataset", "xxhash", "data_shards"}
REMOTE_NEEDS = {"filelock", "fsspec"}  # torch needs both
READS_PICKLES = {
    "dualforce/train/checkpoint.py", "dualforce/train/partitions.py", "dualforce/codecs/checkpoint_file.py"
}  # fmt: skip
READS_ENVIRONMENT = {"dualforce/launch.py", "tools/launch_local.py"}
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from a import b` counts as a.b, so that packages cannot hide modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def part_of(module: str) -> str:
    return max((part for part in MAY_IMPORT if inside(module, part)), key=len)


def forbidden_imports(module: str, tree: ast.AST) -> list[str]:
    own = part_of(module)
    found = []
    for line, target in imports(tree):
        project = target.split(".")[0] in (*LIBRARY, "tools", "eval", "tests")
        if target.startswith(".") or (project and not allowed(own, target)):
            found.append(f"line {line}: {target}")
    return found


def allowed(own: str, target: str) -> bool:
    if own == "dualforce":
        return target == "dualforce"
    if inside(target, own):
        return True
    # A bare "dualforce" stands for the package's version only, not for everything below it.
    return any(target == "dualforce.__version__" if part == "dualforce" else inside(target, part)
               for part in MAY_IMPORT[own])  # fmt: skip


def pickle_uses(tree: ast.AST) -> list[str]:
    found = [
        f"line {line}: {name}" for line, name in imports(tree)
        if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve") or name == "torch.load"
    ]  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch":
            found.append(f"line {node.lineno}: torch.load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno}: allow_pickle")
    return found


def environment_uses(tree: ast.AST) -> list[str]:
    return [
        f"line {node.lineno}: os.{node.attr}" for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        and ast.unparse(node.value) == "os"
    ] + [f"line {line}: {name}" for line, name in imports(tree) if name in ("os.environ", "os.getenv")]  # fmt: skip


def mutable_globals(tree: ast.Module) -> list[str]:
    """Module-level containers that are not constant tables (CAPITALS), anything that changes a module-level name, and
    caches on functions, which are module-level state under another name."""
    found, tables = [], set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_container(node.value):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                name = ast.unparse(target)
                tables.add(name)
                if name != "__all__" and name != name.upper():
                    found.append(f"line {node.lineno}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global {', '.join(node.names)}")
        found += [f"line {node.lineno}: changes {name}" for name in changed_names(node) & tables]
        for decorator in getattr(node, "decorator_list", []):
            if ast.unparse(decorator).split("(")[0].split(".")[-1] in ("cache", "lru_cache"):
                found.append(f"line {node.lineno}: cache on {node.name}")
    return found


def is_container(value: ast.expr | None) -> bool:
    kinds = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = ("list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict")
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in makers
    return isinstance(value, kinds)


def changed_names(node: ast.AST) -> set[str]:
    """Names whose contents `node` changes: x[...] = , del x[...], x += , x.append(...)."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = [target.value for target in node.targets if isinstance(target, ast.Subscript)]
    elif isinstance(node, ast.AugAssign):
        targets = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        targets = [node.func.value]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def top_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module(body=[node], type_ignores=[]))


def report(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{path} {item}" for path, items in found.items() for item in items)


def test_there_is_something_to_check() -> None:
    assert len(sources(*LIBRARY)) > 20


def test_imports_follow_the_order_of_dependency() -> None:
    found = {name_of(path): forbidden_imports(module_of(path), parsed(path)) for path in sources(*LIBRARY, "tools")}
    assert not any(found.values()), report(found)


def test_optional_packages_are_imported_in_one_place_each_inside_a_function() -> None:
    users: dict[str, set[str]] = {package: set() for package in OPTIONAL}
    for path in sources(*LIBRARY, "tools"):
        tree = parsed(path)
        at_top = {name.split(".")[0] for _, name in top_level_imports(tree)}
        assert not at_top & set(OPTIONAL), f"{name_of(path)}: {at_top & set(OPTIONAL)} at module level"
        for package in OPTIONAL:
            if any(inside(name, package) for _, name in imports(tree)):
                users[package].add(PLACES.get(name_of(path.parent), name_of(path)))
    assert all(len(files) <= 1 for files in users.values()), users


def test_shard_contract_needs_few_packages() -> None:
    for path in sources("data_shards"):
        used = {name.split(".")[0] for _, name in imports(parsed(path))}
        needs = CONTRACT_NEEDS | (REMOTE_NEEDS if path.parent.name == "remote" else set())
        assert used <= needs | sys.stdlib_module_names, name_of(path)


def test_pickles_are_read_where_checkpoints_are_only() -> None:
    found = {name_of(path): pickle_uses(parsed(path)) for path in sources(*LIBRARY, "tools")}
    offenders = {name: items for name, items in found.items() if items and name not in READS_PICKLES}
    assert not offenders, report(offenders)


def test_environment_is_read_in_the_launch_module_only() -> None:
    found = {name_of(path): environment_uses(parsed(path)) for path in sources(*LIBRARY, "tools")}
    offenders = {name: items for name, items in found.items() if items and name not in READS_ENVIRONMENT}
    assert not offenders, report(offenders)


def test_no_mutable_module_globals() -> None:
    found = {name_of(path): mutable_globals(parsed(path)) for path in sources(*LIBRARY, "tools")}
    assert not any(found.values()), report(found)


def test_model_knows_nothing_of_ranks() -> None:
    found = {
        name_of(path): [
            f"line {line}: {name}" for line, name in imports(parsed(path)) if inside(name, "torch.distributed")
        ]
        for path in sources("dualforce/model")
    }
    assert not any(found.values()), report(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("megatron_ext.kernels.x", "import dualforce.types"),
        ("data_shards.x", "from dualforce import types"),
        ("dualforce.types", "from dualforce.config import RunConfig"),
        ("dualforce.model.x", "from dualforce.losses import total"),
        ("dualforce.codecs.x", "import dualforce.data.windows"),
        ("dualforce.train.x", "from dualforce.weights.export import write_model"),
        ("dualforce.generate.x", "from dualforce import preprocess"),
        ("dualforce.generate.x", "from tools import demo"),
        ("dualforce.model.x", "from . import block"),
    ],
)
def test_checker_catches_a_wrong_import(module: str, line: str) -> None:
    assert forbidden_imports(module, ast.parse(line))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dualforce.model.x", "from megatron_ext.kernels.kernel_set import KernelSet"),
        ("dualforce.data.x", "from data_shards.reader import ShardSet"),
        ("dualforce.cli", "from dualforce.train.checkpoint import read_fp32_state"),
        ("tools.x", "from dualforce import __version__"),
    ],
)
def test_checker_lets_a_right_import_pass(module: str, line: str) -> None:
    assert not forbidden_imports(module, ast.parse(line))


@pytest.mark.parametrize(
    "line", ["import pickle", "from torch import load", "x = torch.load(p)", "np.load(p, allow_pickle=True)"]
)
def test_checker_catches_pickles(line: str) -> None:
    assert pickle_uses(ast.parse(line))


@pytest.mark.parametrize(
    "code",
    [
        "state = {}",
        "_seen: set[int] = set()",
        "def f():\n    global x\n    x = 1",
        "TABLE = {}\ndef f(k):\n    TABLE[k] = 1",
        "NAMES = []\ndef f(k):\n    NAMES.append(k)",
        "import functools\n@functools.lru_cache(maxsize=1)\ndef f(): ...",
    ],
)
def test_checker_catches_mutable_globals(code: str) -> None:
    assert mutable_globals(ast.parse(code))


def test_checker_catches_the_environment() -> None:
    assert environment_uses(ast.parse("import os\nos.environ['A']"))
    assert environment_uses(ast.parse("from os import environ"))


def test_deepspeed_files_hold_no_key_of_a_run_file() -> None:
    """Batch sizes and step counts live in the run file; here they are "auto"."""
    files = sorted(path for path in (ROOT / "ds_configs").rglob("*.json") if "runs" not in path.parts)
    assert len(files) >= 5
    for path in files:
        values = json.loads(path.read_text())
        batch = {key: values[key] for key in values if "batch" in key or key == "gradient_accumulation_steps"}
        assert set(batch.values()) == {"auto"} and len(batch) == 3, f"{path}: {batch}"
        assert values["scheduler"]["params"]["total_num_steps"] == "auto", path
        assert values["optimizer"]["params"]["torch_adam"] is True, f"{path}: would compile an optimizer"
