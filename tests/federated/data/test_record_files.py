from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from federated.data.document_files import read_source
from federated.data.record_files import (
    DOCUMENT_CHARACTERS,
    read_file,
    record_stem,
    record_suffix,
    split_text,
)
from tests.conftest import shared_path


def texts(source: Path | str) -> dict[str, list[str]]:
    return {split: [record["text"] for _, record in part] for split, part in read_source(str(source)).items()}


@given(st.text(alphabet="ab \n", max_size=9000), st.integers(0, 3))
def test_splitting_a_plain_text_loses_nothing(text, repeats):
    text = text * 2**repeats
    pieces = split_text(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1.5 * DOCUMENT_CHARACTERS for piece in pieces)
    assert all(len(piece) > DOCUMENT_CHARACTERS / 2 for piece in pieces[:-1])


def test_a_text_is_cut_at_blank_lines_before_lines_before_words():
    paragraph = "word " * 60 + "\nline\n"
    pieces = split_text((paragraph + "\n") * 50)
    assert len(pieces) > 5 and all(piece.endswith("\n\n") for piece in pieces)
    pieces = split_text(paragraph * 50)
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)
    assert all(piece.endswith(" ") for piece in split_text("word " * 5000)[:-1])
    assert [len(piece) for piece in split_text("x" * 4500)] == [2000, 2500]


def test_separators_in_a_plain_text_are_documents():
    assert split_text("one\n\nstill one<|endoftext|>two\fthree") == ["one\n\nstill one", "two", "three"]
    assert split_text("short") == ["short"] and split_text("") == [""]


def test_json_lines_and_lists(tmp_path):
    records = [{"text": "a\u2028b"}, {"text": "c"}]
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(records[0], ensure_ascii=False) + "\n\n" + json.dumps(records[1]))
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    assert [record for _, record in read_file(lines)] == records
    assert [record for _, record in read_file(tmp_path / "b.json")] == records
    lines.rename(tmp_path / "c.json")
    assert [record for _, record in read_file(tmp_path / "c.json")] == records
    assert [where for where, _ in read_file(tmp_path / "c.json")][1].endswith("c.json, line 3")


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\r\nd")
    assert texts(tmp_path / "a.txt") == {"": ["abc\nd"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "at line 3"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "expected a JSON object in .*line 2, got list"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "at line 2"),
        ("a.json", b'[{"text": "a"}, 3]', "record 2, got int"),
        ("a.txt", b"abc\xff", "invalid start byte at byte 3"),
        ("a.docx", b"a,b", "expected a .txt, .jsonl, .json, .ndjson, .csv or .parquet file"),
        ("a.jsonl", b"{broken\n", "at line 1"),
        ("a.json", b'{"data": [{"text": "a"},\n {"text" "b"}]}', "at line 2"),
        ("a.csv", b'text,n\na,1\n"b,2\n', "expected CSV in .*at line 3"),
        ("a.csv", b"text,n\na,1\nb, c,2\n", "expected 2 cells in .*line 3, got 3"),
        ("a.csv", b"text\nabc\xff\n", "invalid start byte at byte 8"),
        ("a.parquet", b"PAR1 no table", "expected a Parquet file"),
        ("a.parquet", b"", "expected a Parquet file"),
        ("a.jsonl.gz", b'{"text": "a"}', "expected a readable file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], "expected a readable file"),
    ],
)
def test_malformed_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_source(str(tmp_path / name))[""])
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suffix", "stem"),
    [
        ("a.jsonl", ".jsonl", "a"),
        ("A.JSONL.GZ", ".jsonl", "A"),
        ("a.b.Parquet", ".parquet", "a.b"),
        ("a.parquet.gz", "", "a.parquet"),
        ("a.gz", "", "a"),
        ("a.docx", "", "a"),
        ("csv", "", "csv"),
    ],
)
def test_suffix_and_stem(name, suffix, stem):
    assert (record_suffix(Path(name)), record_stem(Path(name))) == (suffix, stem)


def test_every_kind_of_file_holds_the_same_records(tmp_path):
    records = [{"text": 'a, "quoted"\nline', "tag": "007"}, {"text": "b", "tag": ""}]
    lines = "\n".join(map(json.dumps, records))
    cells = 'text,tag\r\n"a, ""quoted""\nline",007\r\n\r\nb,\r\n'
    for name, content in {
        "a.jsonl": lines,
        "a.ndjson": lines,
        "a.JSON": json.dumps(records, indent=2),
        "b.json": json.dumps({"version": 1, "data": records}, indent=2),
        "c.json": json.dumps({"data": records}),
        "d.jsonl": json.dumps({"data": records}, indent=1),
        "a.CSV": cells,
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 15
    for path in files:
        assert [record for _, record in read_file(path)] == records, path


def test_locations_name_the_line_or_row(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\nb\n')
    Dataset.from_dict({"text": [str(number) for number in range(300)]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert [where.rpartition(", ")[2] for where, _ in read_file(tmp_path / "a.csv")] == ["line 3", "line 4"]
    rows = [
        (where.rpartition(", ")[2], record["text"]) for where, record in read_file(tmp_path / "a.parquet")
    ]
    assert rows == [(f"row {number + 1}", str(number)) for number in range(300)]


def test_one_object_is_one_record_and_an_index_column_is_left_out(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "a", "data": ["x"]}, indent=1))
    (tmp_path / "a.csv").write_text(",text\n0,a\n")
    assert [record for _, record in read_file(tmp_path / "a.json")] == [{"text": "a", "data": ["x"]}]
    assert [record for _, record in read_file(tmp_path / "a.csv")] == [{"text": "a"}]


def test_a_cell_of_any_length_and_nan_in_json(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    (tmp_path / "a.jsonl").write_text('{"text": NaN}\n')
    assert [len(record["text"]) for _, record in read_file(tmp_path / "a.csv")] == [200_000]
    assert math.isnan(next(read_file(tmp_path / "a.jsonl"))[1]["text"])


def test_the_awkward_files_hold_the_same_documents():
    folder = shared_path("data/awkward/files")
    held = [texts(folder / name)[""] for name in ("law.parquet", "law.jsonl.gz", "pretty.json")]
    with gzip.open(folder / "law.jsonl.gz", "rt") as lines:
        assert held[1] == [json.loads(line)["text"] for line in lines]
    assert [len(part) for part in held] == [20, 20, 20]
    assert held[2] == [record["text"] for record in json.loads((folder / "pretty.json").read_text())["data"]]
