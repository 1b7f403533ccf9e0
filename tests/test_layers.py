"""Imports point one way, and each outside world has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "megalign").rglob("*.py"))

# Lowest first. Names on one line may import each other.
LAYERS = [
    {"schema"},
    {"ops"},
    {"data"},
    {"losses"},
    {"convert"},
    {"config", "config_file", "layout", "sections"},
    {"runtime"},
    {"models"},
    {"engines"},
    {"rollout"},
    {"train"},
    {"__main__", "preflight"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules_imported(tree: ast.AST) -> set[str]:
    """Dotted names; for `from a import b` both `a` and `a.b`, because b may be a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; the layers are read from absolute ones"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def reads_environment(tree: ast.AST) -> bool:
    """Whether `os.environ` or `os.getenv` occurs, however it was imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
            if names & {"environ", "environb", "getenv"}:
                return True
    return False


def layer_of(path: Path) -> str:
    """The layer that a file of the package belongs to."""
    return path.relative_to(ROOT / "megalign").with_suffix("").parts[0]


def upward_imports(layer: str, imported: set[str]) -> list[str]:
    """Names under `megalign` that `layer` may not know."""
    ours = {name.split(".")[1]: name for name in imported if name.startswith("megalign.")}
    return [name for part, name in ours.items() if part in LEVELS and LEVELS[part] > LEVELS[layer]]


def may_import_megatron(path: Path) -> bool:
    """The doors to Megatron: models, runtime, its engine and the one file of parallel groups."""
    inside = path.relative_to(ROOT / "megalign")
    if inside.parts[0] in ("models", "runtime"):
        return True
    return inside.parts[0] == "engines" and (inside.name == "groups.py" or inside.stem.startswith("megatron"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = modules_imported(tree)
    layer = layer_of(path)
    if layer != "__init__":
        assert layer in LEVELS, f"{layer} has no place in LAYERS"
        assert not upward_imports(layer, imported)
    roots = {name.split(".")[0] for name in imported}
    assert "megatron" not in roots or may_import_megatron(path)
    assert "deepspeed" not in roots or path.relative_to(ROOT / "megalign") == Path("engines/deepspeed.py")
    assert not reads_environment(tree) or layer == "runtime"


def test_the_checks_see_what_they_forbid():
    upward = modules_imported(ast.parse("from megalign import train\nimport megalign.engines.groups"))
    assert sorted(upward_imports("config", upward)) == ["megalign.engines.groups", "megalign.train"]
    assert upward_imports("train", upward) == []
    inner = "def f():\n    import importlib\n    return importlib.import_module('megatron.core')"
    assert "megatron.core" in modules_imported(ast.parse(inner))
    for text in ("import os\nos.environ['A']", "from os import getenv", "import os as o\no.getenv('A')"):
        assert reads_environment(ast.parse(text))
    assert not reads_environment(ast.parse("import os\nos.getpid()"))
    assert not may_import_megatron(ROOT / "megalign/engines/step.py")
    assert may_import_megatron(ROOT / "megalign/engines/megatron_state.py")
