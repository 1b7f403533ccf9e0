"""Imports point one way, and each outside world has one door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "megalign").rglob("*.py"))

# Lowest first. Names on one line may import each other.
LAYERS = [
    {"schema", "files", "git_lfs", "model_config", "modules"},
    {"ops"},
    {"data"},
    {"losses"},
    {"convert"},
    {"config"},
    {"runtime"},
    {"models"},
    {"engines"},
    {"scores"},
    {"rollout"},
    {"train"},
    {"doctor"},
    {"__main__", "commands", "examples", "preflight"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

# Packages of one engine each; all else reaches them through `engines.build`.
CONCRETE = {path.name for path in (ROOT / "megalign/engines").iterdir() if (path / "__init__.py").is_file()}


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


SHARDS = Path("engines/deepspeed/shard_policy.py")  # Megatron's shards under DeepSpeed's ZeRO


def layer_of(path: Path) -> str:
    """The layer that a file of the package belongs to."""
    return path.relative_to(ROOT / "megalign").with_suffix("").parts[0]


def upward_imports(layer: str, imported: set[str]) -> list[str]:
    """Names under `megalign` that `layer` may not know."""
    ours = {name.split(".")[1]: name for name in imported if name.startswith("megalign.")}
    return [name for part, name in ours.items() if part in LEVELS and LEVELS[part] > LEVELS[layer]]


def module_name(path: Path) -> str:
    """The dotted name of a file of the package; a package's is its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules of `sources` that each one names in an import, those in functions and under TYPE_CHECKING too."""
    graph = {}
    for name, text in sources.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):  # of `from a import b`, only b where b is a module
                paths = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {path if path in sources else (node.module or "") for path in paths}
            elif isinstance(node, (ast.Import, ast.Call)):
                imported |= modules_imported(node)
        graph[name] = (imported & sources.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules of which each imports, directly or through others, each of the rest."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        waiting, reached[start] = list(graph[start]), set()
        while waiting:
            module = waiting.pop()
            if module not in reached[start]:
                reached[start].add(module)
                waiting += graph[module]
    found: list[set[str]] = []
    for module in sorted(graph):
        circle = {other for other in reached[module] if module in reached[other]} | {module}
        if module in reached[module] and circle not in found:
            found.append(circle)
    return found


def may_import_megatron(path: Path) -> bool:
    """The doors to Megatron: models, runtime, its engine, and the one file of another that runs its shards."""
    inside = path.relative_to(ROOT / "megalign")
    if inside.parts[0] in ("models", "runtime"):
        return True
    return inside.parts[:2] == ("engines", "megatron") or inside == SHARDS


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
    assert "deepspeed" not in roots or path.relative_to(ROOT / "megalign").parts[:2] == ("engines", "deepspeed")
    assert not reads_environment(tree) or layer == "runtime"


def test_no_module_imports_itself_through_others():
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in FILES}
    assert circles(import_graph(sources)) == []


def test_circles_are_seen_wherever_an_import_stands():
    sources = {
        "p": "from p.a import x",
        "p.a": "from p.b import x\nimport os",
        "p.b": "from __future__ import annotations\nif TYPE_CHECKING:\n    from p import c",
        "p.c": "def f():\n    from p.d import x",
        "p.d": "import importlib\nimportlib.import_module('p.a')",
        "p.e": "from p.a import x",
    }
    assert import_graph(sources)["p.b"] == {"p.c"}
    assert circles(import_graph(sources)) == [{"p.a", "p.b", "p.c", "p.d"}]
    assert circles(import_graph(sources | {"p.d": ""})) == []
    # A name that the package itself brings is asked of the package, which imports the module that asks.
    assert circles({"p": {"p.a"}, "p.a": {"p"}}) == [{"p", "p.a"}]


def engines_imported(path: Path, imported: set[str]) -> set[str]:
    """Names of concrete engines that a file imports, but of its own."""
    inside = path.relative_to(ROOT / "megalign").parts
    own = inside[1] if inside[0] == "engines" and len(inside) > 2 else None
    found = {name.split(".")[2] for name in imported if name.startswith("megalign.engines.")}
    return (found & CONCRETE) - {own}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_concrete_engine_is_imported_outside_its_own_folder(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = {"megatron"} if path.relative_to(ROOT / "megalign") == SHARDS else set()
    assert engines_imported(path, modules_imported(tree)) <= allowed


def test_the_checks_see_what_they_forbid():
    upward = modules_imported(ast.parse("from megalign import train\nimport megalign.engines.megatron.groups"))
    assert sorted(upward_imports("config", upward)) == ["megalign.engines.megatron.groups", "megalign.train"]
    assert upward_imports("train", upward) == []
    inner = "def f():\n    import importlib\n    return importlib.import_module('megatron.core')"
    assert "megatron.core" in modules_imported(ast.parse(inner))
    for text in ("import os\nos.environ['A']", "from os import getenv", "import os as o\no.getenv('A')"):
        assert reads_environment(ast.parse(text))
    assert not reads_environment(ast.parse("import os\nos.getpid()"))
    assert not may_import_megatron(ROOT / "megalign/engines/step.py")
    assert engines_imported(ROOT / "megalign/train/loop.py", upward) == {"megatron"}
    assert engines_imported(ROOT / "megalign/engines/build.py", upward) == {"megatron"}
    assert engines_imported(ROOT / "megalign/engines/megatron/engine.py", upward) == set()
    assert may_import_megatron(ROOT / "megalign/engines/megatron/weights.py")
