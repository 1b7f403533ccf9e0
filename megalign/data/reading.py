"""Read raw records: JSON lines, lists in JSON, CSV, Parquet (each gz, bz2 or xz too) and `datasets` directories.

A file's first bytes decide its format, not its name; only CSV is recognised by its suffix.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megalign.data.records import BadRecord
from megalign.git_lfs import POINTER_START
from megalign.schema import UserError, reason_of

ALLOWED = (
    "must be a file of JSON lines, a list of objects in JSON, CSV or Parquet (each may be gz, bz2 or xz), "
    "or a directory written by datasets' save_to_disk"
)
SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".bz2", ".xz"}  # suffixes of data files
HEAD = 512  # bytes read to detect a file's format
BOM = b"\xef\xbb\xbf"
OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# First bytes of unsupported files: what the file is, and what to do about it.
FOREIGN: dict[bytes, str] = {
    POINTER_START: "a Git LFS pointer, not the data; fetch it with `git lfs pull`",
    b"(\xb5/\xfd": "compressed with zstd; decompress it with `zstd -d`",
    b"\x04\x22\x4d\x18": "compressed with lz4; decompress it with `lz4 -d`",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"ARROW1": "an Arrow file; give the directory that save_to_disk wrote, or Parquet",
    b"\xff\xff\xff\xff": "an Arrow file; give the directory that save_to_disk wrote, or Parquet",
    b"\xff\xfe\x00\x00": "UTF-32; convert it with `iconv -f UTF-32 -t UTF-8`",
    b"\xff\xfe": "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"SQLite format 3": "an SQLite database; write its rows as JSON lines",
    b"<!doctype html": "an HTML page, not data; download the file itself",
    b"<html": "an HTML page, not data; download the file itself",
}


@dataclass(frozen=True, slots=True)
class RawRecord:
    """Holds an unparsed line of a file or row of a table; `origin` is `path:line`, `path:row` or `path[index]`."""

    origin: str
    content: Any  # a line's bytes, a row or list element, or the `BadRecord` of a malformed row

    def fields(self) -> dict[str, Any]:
        """Return the record as a dict; a line that is not a JSON object is a bad record."""
        if isinstance(self.content, Mapping):
            return dict(self.content)
        if isinstance(self.content, BadRecord):
            raise self.content
        noun, value = "element", self.content
        if isinstance(self.content, bytes):
            noun = "line"
            try:
                value = json.loads(self.content.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                message = f"the line is not valid JSON ({error}); must be one object a line"
                raise BadRecord("invalid JSON", message, kinds={"invalid JSON"}) from None
        if not isinstance(value, dict):
            message = f"the {noun} is a {type(value).__name__}; must be one object a line, or a list of objects"
            raise BadRecord("invalid JSON", message, kinds={"not an object"})
        return value


def read_raw(path: str, *, field: str = "data.path") -> Iterator[RawRecord]:
    """Yield the records of a file (lines count from 1, blank ones are skipped), directory or table (rows from 0)."""
    source = Path(path)
    if not source.exists():
        hub = ""
        if path.startswith("hf://") or (re.fullmatch(r"[\w.-]+/[\w.-]+", path) and source.suffix not in SUFFIXES):
            hub = "; a data set of the Hub is saved first with datasets.load_dataset(...).save_to_disk(DIR)"
        raise UserError(f"{field} is {path!r}: no such file or directory; {ALLOWED}{hub}")
    try:
        yield from _read_directory(source, field=field) if source.is_dir() else _read_file(path, field=field)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or reason_of(error)
        raise UserError(f"{field} is {path!r}: {reason}; {ALLOWED}") from None


def foreign_kind(head: bytes) -> str | None:
    """Return what an unsupported file that begins with `head` is, such as a Git LFS pointer; else None."""
    start = head.lstrip()[:20].lower()
    for mark, kind in FOREIGN.items():
        if head.startswith(mark) or (mark.startswith(b"<") and start.startswith(mark)):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    return "a binary file of another kind" if b"\x00" in head else None


def _read_file(path: str, *, field: str) -> Iterator[RawRecord]:
    with open(path, "rb") as file:
        mark = file.peek(HEAD)[:HEAD]
    opener = next((opener for magic, opener in OPENERS.items() if mark.startswith(magic)), open)
    with opener(path, "rb") as stream:
        head = stream.peek(HEAD)[:HEAD]
        if head.startswith(b"PAR1"):
            yield from _parquet_rows(path, io.BytesIO(stream.read()) if opener is not open else stream, field=field)
            return
        if kind := foreign_kind(head):
            raise UserError(f"{field} is {path!r}, which is {kind}; {ALLOWED}")
        suffixes = {suffix.lower() for suffix in Path(path).suffixes[-2:]}
        if suffixes & {".csv", ".tsv"}:
            yield from _csv_rows(path, stream, field=field, delimiter="\t" if ".tsv" in suffixes else ",")
        elif head.removeprefix(BOM).lstrip().startswith(b"["):
            yield from _list_or_lines(path, stream, field=field)
        else:
            yield from _lines(path, stream, field=field)


def _lines(path: str, stream: IO[bytes], *, field: str) -> Iterator[RawRecord]:
    first = stream.readline()
    if first.removeprefix(BOM).strip() and _parsed(first) is None:
        rest = stream.read()
        whole = _parsed(first + rest)
        if isinstance(whole, dict):
            lists = [repr(key) for key, value in whole.items() if isinstance(value, list)]
            alone = f" (such as the one under {' or '.join(lists[:3])} alone)" if lists else ""
            raise UserError(
                f"{field} is {path!r}, which is one JSON object over several lines; "
                f"must be one object a line, or a list of objects{alone}"
            )
        stream = io.BytesIO(rest)
    for number, line in enumerate(itertools.chain([first], stream), start=1):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield RawRecord(f"{path}:{number}", text)


def _list_or_lines(path: str, stream: IO[bytes], *, field: str) -> Iterator[RawRecord]:
    """Yield the elements of a JSON list of objects, or the file's lines if it is anything else."""
    data = stream.read()
    try:
        rows = json.loads(data.removeprefix(BOM).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if _parsed(data.lstrip(BOM + b"\r\n\t ").partition(b"\n")[0]) is None:
            raise UserError(f"{field} is {path!r}, a JSON list that is not valid ({error}); {ALLOWED}") from None
        rows = None
    if isinstance(rows, list) and (not rows or isinstance(rows[0], dict)):
        for index, row in enumerate(rows):
            yield RawRecord(f"{path}[{index}]", row)
    else:
        yield from _lines(path, io.BytesIO(data), field=field)


def _parsed(text: bytes) -> Any:
    """Return parsed JSON, or None if `text` is not valid."""
    try:
        return json.loads(text.removeprefix(BOM).decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _csv_rows(path: str, stream: IO[bytes], *, field: str, delimiter: str) -> Iterator[RawRecord]:
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    csv.field_size_limit(sys.maxsize)  # the csv module's default limit is 131072 characters
    try:
        names = rows.fieldnames or []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{field} is {path!r}, whose header names the column {twice!r} twice; must be once")
        for row in rows:
            content: Any = row
            if None in row or None in row.values():
                message = f"the row and the header differ in their number of cells; must be {len(names)}"
                content = BadRecord("cells of the row", message, kinds={"cells of the row"})
            yield RawRecord(f"{path}:{rows.line_num}", content)
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"{path}:{rows.line_num}"
        raise UserError(
            f"{field}: {where}: the row is not valid CSV in UTF-8 ({reason_of(error)}); {ALLOWED}"
        ) from None


def _parquet_rows(path: str, source: IO[bytes], *, field: str) -> Iterator[RawRecord]:
    import pyarrow  # slow to import, and used only for Parquet
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches():
            for row in batch.to_pylist():
                yield RawRecord(f"{path}:{number}", _without_nulls(row))
                number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{field} is {path!r}: the Parquet file cannot be read ({reason_of(error)})") from None


def _read_directory(folder: Path, *, field: str) -> Iterator[RawRecord]:
    import datasets  # slow to import, and used only for directories

    path = str(folder)
    for file in sorted(folder.glob("*.arrow")):
        with open(file, "rb") as stream:
            kind = foreign_kind(stream.read(HEAD))
        if kind == FOREIGN[POINTER_START]:
            raise UserError(f"{field} is {path!r}: {file.name} is {kind}")
    try:
        rows = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        inside = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if _looks_like_data(file))
        files = (
            f"; it holds {', '.join(inside[:4])}{', ...' if inside[4:] else ''}: give one of them, or several as "
            + ("data.sources" if inside else "")
        )
        reason = str(error).splitlines()[0]
        raise UserError(f"{field} is {path!r}: {reason}; {ALLOWED}{files if inside else ''}") from None
    if isinstance(rows, datasets.DatasetDict):
        raise UserError(f"{field} is {path!r}, which holds splits; must be one of its folders {sorted(rows)}")
    for number, row in enumerate(rows.with_format(None)):
        yield RawRecord(f"{path}:{number}", _without_nulls(row))


def _looks_like_data(file: Path) -> bool:
    return (
        bool({".json", ".jsonl", ".parquet", ".csv", ".tsv"} & set(file.suffixes)) and file.name != "dataset_info.json"
    )


def _without_nulls(value: Any) -> Any:
    """Return the value without null fields: Arrow fills in null where a record lacks a field."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
