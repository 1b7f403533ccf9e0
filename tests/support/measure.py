"""Measure the size of the code: lines by file and function, nesting, types and docstrings of public functions.

Run: python -m tests.support.measure [files or folders; megalign by default]
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES, NESTING = 350, 60, 3
# First words that leave a docstring without a verb, or lean on the docstring above it.
WEAK_BEGINNINGS = ("Of ", "What ", "The same", "Within")
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Function:
    """One function or method; `nesting` counts blocks inside blocks, inner functions start again at 0."""

    name: str
    line: int
    lines: int
    nesting: int
    public: bool
    typed: bool
    documented: bool


@dataclass(frozen=True)
class Module:
    """One file: its functions, its docstrings as (name, text), and each class's bases by their last names."""

    path: Path
    lines: int
    functions: tuple[Function, ...]
    docstrings: tuple[tuple[str, str], ...]
    bases: dict[str, tuple[str, ...]]


def measure(path: Path) -> Module:
    """Read one Python file and measure it."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions, docstrings, bases = [], [("module", ast.get_docstring(tree) or "")], {}
    for node, name, reachable in _definitions(tree, "", reachable=True):
        docstrings.append((name, ast.get_docstring(node) or ""))
        if isinstance(node, ast.ClassDef):
            bases[name] = tuple(ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases)
        else:
            functions.append(_function(node, name, public=reachable and not node.name.startswith("_")))
    return Module(path, text.count("\n"), tuple(functions), tuple(docstrings), bases)


def _definitions(tree: ast.AST, prefix: str, *, reachable: bool) -> Iterator[tuple[Definition, str, bool]]:
    """Yield (class or function, dotted name, whether an importer can reach it) for everything below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield from _definitions(node, prefix, reachable=reachable)
            continue
        yield node, f"{prefix}{node.name}", reachable
        inside = reachable and isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        yield from _definitions(node, f"{prefix}{node.name}.", reachable=inside)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, *, public: bool) -> Function:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    typed = node.returns is not None and all(arg.annotation or arg.arg in ("self", "cls") for arg in named)
    overload = any(getattr(item, "id", getattr(item, "attr", "")) == "overload" for item in node.decorator_list)
    documented = ast.get_docstring(node) is not None or overload
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return Function(name, node.lineno, lines, _nesting(node.body), public, typed, documented)


def _nesting(body: Iterable[ast.AST]) -> int:
    """Depth of blocks inside blocks; `elif` is no deeper than its `if`, and inner functions are measured alone."""
    deepest = 0
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
            deepest = max(deepest, _nesting(node.orelse))
            children.remove(node.orelse[0])
        deepest = max(deepest, _nesting(children) + isinstance(node, BLOCKS))
    return deepest


def problems(modules: Sequence[Module], root: Path = ROOT) -> list[str]:
    """`path: what breaks which limit` for every breach, without numbers that change with every edit."""
    documented = _documented_methods(modules)
    found = []
    for module in modules:
        path = module.path.relative_to(root)
        if module.lines > FILE_LINES:
            found.append(f"{path}: the file has over {FILE_LINES} lines")
        for function in module.functions:
            breaches = {
                f"has over {FUNCTION_LINES} lines": function.lines > FUNCTION_LINES,
                f"nests over {NESTING} deep": function.nesting > NESTING,
                "is not typed": function.public and not function.typed,
                "has no docstring": function.public and not (function.documented or function.name in documented),
            }
            found += [f"{path}: {function.name} {breach}" for breach, is_so in breaches.items() if is_so]
        found += [
            f"{path}: the docstring of {name} begins {' '.join(text.split()[:3])!r}"
            for name, text in module.docstrings
            if text.startswith(WEAK_BEGINNINGS)
        ]
    return found


def _documented_methods(modules: Iterable[Module]) -> set[str]:
    """`Class.method` of every method whose docstring stands at a base class, here or outside (forward of a layer)."""
    own = {function.name for module in modules for function in module.functions if function.documented}
    bases = {name: names for module in modules for name, names in module.bases.items()}
    inherited = {f"{name}.forward" for name, names in bases.items() if names}
    for name in bases:
        waiting = list(bases[name])
        while waiting:
            base = waiting.pop()
            waiting += bases.get(base, ())
            inherited |= {name + method.removeprefix(base) for method in own if method.rpartition(".")[0] == base}
    return inherited


def python_files(*places: Path) -> list[Path]:
    """All Python files at or under the given places."""
    return sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))


def table(modules: Sequence[Module], root: Path = ROOT) -> str:
    """One line a file: lines, functions, longest and median function, nesting, and public functions."""
    rows = [("file", "lines", "functions", "longest", "median", "nesting", "public", "typed", "documented")]
    rows += [_row(str(module.path.relative_to(root)), module.lines, module.functions) for module in modules]
    everything = tuple(function for module in modules for function in module.functions)
    rows.append(_row(f"all {len(modules)} files", sum(module.lines for module in modules), everything))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    )


def _row(name: str, lines: int, functions: Sequence[Function]) -> tuple[str, ...]:
    lengths = sorted(function.lines for function in functions) or [0]
    public = [function for function in functions if function.public]
    numbers = (
        lines,
        len(functions),
        lengths[-1],
        lengths[len(lengths) // 2],
        max((function.nesting for function in functions), default=0),
        len(public),
        sum(function.typed for function in public),
        sum(function.documented for function in public),
    )
    return (name, *map(str, numbers))


def main() -> None:
    """Print the table, then every breach of a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, default=[ROOT / "megalign"])
    modules = [measure(path) for path in python_files(*(place.resolve() for place in parser.parse_args().places))]
    print(table(modules))
    print(*problems(modules), sep="\n")


if __name__ == "__main__":
    main()
