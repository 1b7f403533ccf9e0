"""Files, functions and nesting stay small, public functions typed and documented: see tests/support/measure.py."""

from __future__ import annotations

from pathlib import Path

from tests.support.measure import ROOT, measure, problems, python_files

MEASURED = ("megalign", "tools", "launch", "tests/support")


def test_the_code_keeps_its_limits():
    modules = [measure(path) for path in python_files(*(ROOT / name for name in MEASURED))]
    assert problems(modules) == []


def breaches(folder: Path, text: str) -> list[str]:
    """What the measure says of one file, without the file's name."""
    path = folder / "code.py"
    path.write_text(text)
    return [line.removeprefix("code.py: ") for line in problems([measure(path)], folder)]


def test_each_limit_is_seen(tmp_path):
    def short(doc: str) -> str:
        return f'def f() -> int:\n    """{doc}"""\n    return 1\n'

    assert breaches(tmp_path, short("Return one.")) == []
    assert breaches(tmp_path, "\n" * 350) == []
    assert breaches(tmp_path, "\n" * 351) == ["the file has over 350 lines"]
    assert breaches(tmp_path, short("Return one.") + "    # more\n" * 58 + "    f()\n") == ["f has over 60 lines"]
    assert breaches(tmp_path, "def f() -> int:\n    return 1\n") == ["f has no docstring"]
    assert breaches(tmp_path, "def _f():\n    return 1\n") == []
    assert breaches(tmp_path, 'def f(a, b: int) -> int:\n    """Return one."""\n') == ["f is not typed"]
    assert breaches(tmp_path, 'def f(a: int):\n    """Return one."""\n') == ["f is not typed"]
    for start in ("Of each", "What it", "The same as", "Within it"):
        name = " ".join(f"{start} is so".split()[:3])
        assert breaches(tmp_path, short(f"{start} is so.")) == [f"the docstring of f begins {name!r}"]
        assert breaches(tmp_path, f'"""{start} is so."""\n') == [f"the docstring of module begins {name!r}"]


def test_nesting_counts_blocks_inside_blocks(tmp_path):
    deep = "def _f(a):\n    for b in a:\n        with b:\n            while b:\n"
    assert breaches(tmp_path, f"{deep}                b()\n") == []
    assert breaches(tmp_path, f"{deep}                if b:\n                    b()\n") == ["_f nests over 3 deep"]
    assert (
        breaches(tmp_path, f"{deep}                def g():\n                    if b:\n                        b()\n")
        == []
    )
    chain = "def _f(a):\n    if a == 0:\n        a()\n" + "".join(
        f"    elif a == {number}:\n        a()\n" for number in range(1, 9)
    )
    assert breaches(tmp_path, chain) == []


def test_a_docstring_may_stand_at_the_base_class(tmp_path):
    base = 'class Base:\n    def f(self) -> int:\n        """Return one."""\n'
    inner = "class Inner(Base[int]):\n    def f(self) -> int:\n        return 1\n"
    assert breaches(tmp_path, base + inner) == []
    assert breaches(tmp_path, base + inner.replace("f(", "g(")) == ["Inner.g has no docstring"]
    assert breaches(tmp_path, inner) == ["Inner.f has no docstring"]
