from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from federated.data import document_files
from federated.data.document_files import DOCUMENT_CHARACTERS, read_file, read_source, split_text


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
        ("a.csv", b"a,b", "expected a .txt, .jsonl, .json file"),
    ],
)
def test_malformed_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_source(str(tmp_path / name))[""])
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_folder_keeps_train_and_valid_apart(tmp_path):
    write(tmp_path / "train-0.jsonl", {"text": "a"})
    write(tmp_path / "train-1.jsonl", {"text": "b"})
    write(tmp_path / "validation.jsonl", {"text": "c"})
    assert texts(tmp_path) == {"train": ["a", "b"], "valid": ["c"]}


def test_test_files_are_held_out_only_where_there_is_no_valid_file(tmp_path):
    write(tmp_path / "local_training_0.json", {"text": "a"})
    write(tmp_path / "global_test.json", {"text": "b"})
    assert texts(tmp_path) == {"train": ["a"], "valid": ["b"]}
    write(tmp_path / "valid.json", {"text": "c"})
    assert texts(tmp_path) == {"train": ["a"], "valid": ["c"]}


@pytest.mark.parametrize(
    ("train", "held_out"), [("train", "val"), ("training", "dev"), ("Train", "TEST"), ("train.a", "eval_0")]
)
def test_split_words_of_file_names(tmp_path, train, held_out):
    write(tmp_path / f"{train}.jsonl", {"text": "a"})
    write(tmp_path / f"{held_out}.jsonl", {"text": "b"})
    assert texts(tmp_path) == {"train": ["a"], "valid": ["b"]}


def test_files_of_one_stem_are_all_read_and_one_without_a_split_word_is_left_out_aloud(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    write(tmp_path / "train.json", {"text": "b"})
    write(tmp_path / "dev.jsonl", {"text": "c"})
    write(tmp_path / "more.jsonl", {"text": "d"})
    with pytest.warns(UserWarning, match="'more': it is left out of"):
        assert texts(tmp_path) == {"train": ["b", "a"], "valid": ["c"]}


def test_a_folder_without_a_split_is_one_whole(tmp_path):
    write(tmp_path / "latest.jsonl", {"text": "a"})
    write(tmp_path / "constrained.jsonl", {"text": "b"})
    (tmp_path / "notes.md").write_text("not read")
    assert texts(tmp_path) == {"": ["b", "a"]}


def test_datasets_saved_to_disk(tmp_path):
    part = Dataset.from_dict({"text": ["a", "b"]})
    part.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(str(tmp_path / "two"))
    DatasetDict({"training": part, "dev": part.select([0])}).save_to_disk(str(tmp_path / "three"))
    assert texts(tmp_path / "one") == {"": ["a", "b"]}
    assert texts(tmp_path / "two") == {"train": ["a", "b"], "valid": ["b"]}
    assert texts(tmp_path / "three") == {"train": ["a", "b"], "valid": ["a"]}


def test_a_folder_that_load_dataset_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(folder / "train.parquet"))
    Dataset.from_dict({"text": ["c"]}).to_parquet(str(folder / "validation.parquet"))
    assert texts(folder) == {"train": ["a", "b"], "valid": ["c"]}


def test_a_hub_id_goes_to_load_dataset_with_its_configuration(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})

    monkeypatch.setattr(document_files.datasets, "load_dataset", load_dataset)
    assert texts("owner/name:small") == {"": ["a"]} and texts("wikitext") == {"": ["a"]}
    assert asked == [("owner/name", "small"), ("wikitext", None)]


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    def load_dataset(name, config):
        raise ConnectionError("no such dataset\nand a long tail")

    monkeypatch.setattr(document_files.datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="got 'owner/name': no such dataset$"):
        read_source("owner/name")
    for source in (str(tmp_path / "none"), "none.jsonl", "owner/none.txt", "a b"):
        with pytest.raises(UserError, match="expected an existing file or folder or a hub dataset id"):
            read_source(source)
    with pytest.raises(UserError, match="got an empty one"):
        read_source("")


def test_an_empty_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty") as caught:
        read_source(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
