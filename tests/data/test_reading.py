"""Check that files are read by content, not name, and that files without records are refused with the reason."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from megalign.data.reading import read_raw
from megalign.data.records import BadRecord
from megalign.schema import UserError

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": 'a, "b"\nc', "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2).encode()
CSV = b'prompt,completion\n1+1=,2\n"a, ""b""\nc",d\n'


def parquet(rows=ROWS):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def read(path):
    raws = list(read_raw(str(path)))
    return [raw.origin.removeprefix(str(path)) for raw in raws], [raw.fields() for raw in raws]


@pytest.mark.parametrize(
    ("name", "content", "origins"),
    [
        ("a.jsonl", LINES, [":1", ":2"]),
        ("a.jsonl", b"\xef\xbb\xbf\n" + LINES, [":2", ":3"]),
        ("a.jsonl", gzip.compress(LINES), [":1", ":2"]),
        ("a.jsonl.gz", gzip.compress(LINES), [":1", ":2"]),
        ("a.jsonl", bz2.compress(LINES), [":1", ":2"]),
        ("a.json.xz", lzma.compress(ARRAY), ["[0]", "[1]"]),
        ("a.jsonl", parquet(), [":0", ":1"]),
        ("a.parquet", parquet(), [":0", ":1"]),
        ("a.jsonl", gzip.compress(parquet()), [":0", ":1"]),
        ("a.json", ARRAY, ["[0]", "[1]"]),
        ("a.jsonl", b"\xef\xbb\xbf  \n" + ARRAY, ["[0]", "[1]"]),
        ("a", json.dumps(ROWS).encode(), ["[0]", "[1]"]),
        ("a.csv", CSV, [":2", ":4"]),
        ("a.csv.gz", gzip.compress(CSV), [":2", ":4"]),
        ("a.tsv", b'prompt\tcompletion\n1+1=\t2\n"a, ""b""\nc"\td\n', [":2", ":4"]),
    ],
)
def test_a_file_is_read_by_its_content(name, content, origins, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == (origins, ROWS)


def test_rows_of_parquet_lack_what_is_null(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "tool", "content": "b", "name": "c"}]}
    ]
    (tmp_path / "a").write_bytes(parquet(rows + [{"messages": None}]))
    first, second = read(tmp_path / "a")[1]
    assert first == {"messages": [{"role": "user", "content": "a"}, rows[0]["messages"][1]]} and second == {}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", POINTER, ["a Git LFS pointer, not the data", "git lfs pull"]),
        ("a.parquet", POINTER, ["a Git LFS pointer"]),
        ("a.jsonl", gzip.compress(LINES)[:-20], ["ended before", "must be"]),
        ("a.jsonl", b"\x1f\x8b\x08nonsense that is no stream", ["must be a file of JSON lines"]),
        ("a.jsonl", parquet()[:-30], ["Parquet file cannot be read"]),
        ("a.jsonl", b"\x28\xb5\x2f\xfd rest", ["zstd -d"]),
        ("a.jsonl", b"PK\x03\x04 rest", ["a zip archive"]),
        ("a.jsonl", b"ARROW1\x00\x00", ["an Arrow file", "save_to_disk"]),
        ("a.jsonl", LINES.decode().encode("utf-16"), ["UTF-16", "iconv"]),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", ["an HTML page"]),
        ("a.jsonl", b"\x89PNG\x00\x01", ["a binary file"]),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode(), ["over several lines", "under 'data'"]),
        ("a.json", ARRAY[:-5], ["a JSON list that is not valid"]),
        ("a.jsonl", LINES.decode().encode("utf-32"), ["UTF-32", "iconv"]),
        ("a.csv", b"prompt,completion,completion\n1,2,3\n", ["header names the column 'completion' twice"]),
        ("a.csv", b"prompt,completion\n\xe9,b\n", ["not valid CSV in UTF-8"]),
        ("a.csv", b'prompt,completion\n"1,2\n', ["not valid CSV"]),
    ],
)
def test_what_holds_no_records_is_told_in_a_line(name, content, parts, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert "data.path" in str(error.value) or str(error.value).startswith(f"{path}:2: ")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("row", [b"1,2,3", b"1"])
def test_a_row_of_other_length_is_one_bad_record(row, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + row + b"\na,b\n")
    first, second = read_raw(str(path))
    with pytest.raises(BadRecord, match="the row and the header differ in their number of cells; must be 2"):
        first.fields()
    assert first.origin == f"{path}:2" and second.fields() == {"prompt": "a", "completion": "b"}


def test_a_long_text_in_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\na," + b"b" * 200_000 + b"\n")
    assert len(read(tmp_path / "a.csv")[1][0]["completion"]) == 200_000


def test_archives_inside_gzip_are_told_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"name".ljust(257, b"\x00") + b"ustar\x00"))
    with pytest.raises(UserError, match="a tar archive; unpack it"):
        read(tmp_path / "a.jsonl")


def test_a_directory_of_other_files_names_them(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(parquet())
    with pytest.raises(UserError, match="it holds data/train-00000-of-00001.parquet: give one of them, or several as"):
        read(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(POINTER)
    with pytest.raises(UserError, match="data-00000-of-00001.arrow is a Git LFS pointer"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "told"), [("org/name-1.5", True), ("hf://org/name", True), ("data/a.jsonl", False)])
def test_a_name_of_the_hub_says_how_to_save_it(name, told):
    with pytest.raises(UserError, match=f"data.path is '{name}': no such file") as error:
        read(name)
    assert ("save_to_disk(DIR)" in str(error.value)) == told
