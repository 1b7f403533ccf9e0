"""Files and folders that appear whole: what a failure and another writer leave, and that nothing else writes them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from megalign.files import PartialFolder, move, write_at, write_whole, writing
from megalign.schema import UserError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "megalign").rglob("*.py"))
# Files that grow in place: metrics by a line a step, the starts of a requeued job, a tensor after the other in a folder
# that has no name yet, and what a rank that hangs was doing. The doctor tries what a disk can do on files of its own,
# which it removes.
OWN_WAYS = {
    "train/metrics_file.py": {"open"},
    "train/attempts.py": {"open"},
    "runtime/hang_report.py": {"open"},
    "doctor/disk.py": {"open", "link"},
}


def writers(tree: ast.AST) -> Iterator[str]:
    """Calls that rename, sync or write a whole file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        modes = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if name == "open" and any(set(mode) <= set("wxabt+") and set(mode) & set("wxa") for mode in modes):
            yield name
        if name in ("rename", "renames", "fsync", "link", "write_text", "write_bytes", "mkstemp", "NamedTemporaryFile"):
            yield name
        of_os = getattr(getattr(function, "value", None), "id", "") == "os"
        if name == "replace" and (of_os or (len(node.args) == 1 and not node.keywords)):
            yield name  # that of a text takes two, that of a dataclass takes keywords


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_files_py_writes_whole_files(path: Path):
    inside = str(path.relative_to(ROOT / "megalign"))
    if inside != "files.py":
        assert set(writers(ast.parse(path.read_text(encoding="utf-8")))) <= OWN_WAYS.get(inside, set())


@pytest.mark.parametrize(
    "code",
    [
        "a.rename(b)",
        "os.replace(a, b)",
        "a.replace(b)",
        "os.fsync(a)",
        "open(a, 'w')",
        "open(a, 'xb')",
        "a.write_text(b)",
    ],
)
def test_writers_are_seen(code: str):
    assert list(writers(ast.parse(code)))
    assert not list(writers(ast.parse("open(a, 'rb'); open(a); a.replace('w', 'x'); dataclasses.replace(a, b=1)")))


def test_a_file_is_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, "first\n")

    def half(file: IO[bytes]) -> None:
        file.write(b"sec")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a.json cannot be written: No space left on device"), writing(path):
        write_whole(path, half)
    assert path.read_text() == "first\n"
    write_whole(path, b"other\n", replace=False)
    assert path.read_text() == "first\n"
    write_whole(path, lambda file: None)
    assert path.read_text() == ""
    write_whole(tmp_path / "b", "\u00e9", replace=False)
    assert (tmp_path / "b").read_bytes() == b"\xc3\xa9"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b"]


def test_bytes_go_to_their_offset(tmp_path: Path):
    with open(tmp_path / "a", "wb") as file:
        write_at(file.fileno(), b"def", 3)
        write_at(file.fileno(), memoryview(b"abc"), 0)
    assert move(tmp_path / "a", tmp_path / "b").read_bytes() == b"abcdef"


def test_a_folder_has_its_name_once_it_is_whole(tmp_path: Path):
    with PartialFolder(tmp_path / "out") as partial:
        partial.write("hf/config.json", b"{}")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out/hf/config.json").read_bytes() == b"{}"
    with pytest.raises(UserError), PartialFolder(tmp_path / "next") as partial:
        partial.write("a", b"")
        raise UserError("wrong")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_finished_files_wait_for_a_job_of_the_same_key(tmp_path: Path):
    def interrupted(key: str) -> dict[str, object]:
        with pytest.raises(KeyboardInterrupt), PartialFolder(tmp_path / "out", key=key) as partial:
            found = dict(partial.done)
            partial.write("a", b"12")
            partial.finish("a", says=[1])
            partial.write("b", b"not finished")
            raise KeyboardInterrupt
        return found

    assert interrupted("x") == {}
    assert interrupted("x") == {"a": [1]}
    assert interrupted("y") == {}
    partial = PartialFolder(tmp_path / "out", key="y")
    assert partial.done == {"a": [1]}
    assert sorted(file.name for file in partial.path.iterdir()) == [".progress.json", "a"]
    with pytest.raises(UserError, match="is being written by another process"):
        PartialFolder(tmp_path / "out", key="y")
    partial.abandon()
