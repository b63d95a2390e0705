from __future__ import annotations

import json
import time

from server.reporting import record_stream
from server.reporting.record_stream import printing_records, write_records, writing_records
from server.reporting.run_log import read_rounds

ROWS = [{"round": number, "perplexity": 10.0 / number} for number in (1, 2, 3)]


def append(folder, *rows) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_what_a_run_prints_is_written_elsewhere(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    append(here, ROWS[0])
    (here / "summary.json").write_text('{"of": "an earlier run"}')
    with printing_records(here):
        append(here, ROWS[1])
        print("something else, without a line end", end="")
        (here / "failure.json").write_text('{"type": "E", "message": "m"}')
    log = tmp_path / "flower.log"
    log.write_text(
        capsys.readouterr().out + "fedgraft-record rounds.jsonl {broken\nfedgraft-record ../x {}\n"
    )
    there.mkdir()
    write_records(log, there)
    assert read_rounds(there) == [ROWS[1]]  # the first is of an earlier run
    assert json.loads((there / "failure.json").read_text()) == {"type": "E", "message": "m"}
    assert sorted(path.name for path in there.iterdir()) == ["failure.json", "rounds.jsonl"]


def test_records_are_printed_after_an_exception_and_none_without_a_folder(tmp_path, capsys):
    try:
        with printing_records(tmp_path):
            append(tmp_path, ROWS[0])
            raise KeyError
    except KeyError:
        pass
    assert capsys.readouterr().out.count("fedgraft-record rounds.jsonl") == 1
    with printing_records(None):
        pass
    assert capsys.readouterr().out == ""


def test_a_file_that_has_not_changed_is_not_parsed_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record_stream, "POLL_SECONDS", 0.01)
    parsed, looks = [], []

    def counted(log_dir):
        parsed.append(read_rounds(log_dir))
        return parsed[-1]

    def stamped(path, stamp=record_stream._stamp):
        looks.append(path.name)
        return stamp(path)

    monkeypatch.setattr(record_stream, "read_rounds", counted)
    monkeypatch.setattr(record_stream, "_stamp", stamped)
    append(tmp_path, ROWS[0])
    with printing_records(tmp_path):
        deadline = time.monotonic() + 20
        while looks.count("rounds.jsonl") < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        append(tmp_path, ROWS[1])
    # Rounds of an earlier run, the first look, and the line that was appended.
    assert parsed == [ROWS[:1], ROWS[:1], ROWS[:2]] and looks.count("rounds.jsonl") > 5
    assert capsys.readouterr().out == f"\nfedgraft-record rounds.jsonl {json.dumps(ROWS[1])}\n"


def test_records_of_a_growing_log_are_merged_with_earlier_rounds(tmp_path):
    log, folder = tmp_path / "flower.log", tmp_path / "logs"
    folder.mkdir()
    append(folder, ROWS[0], ROWS[1] | {"perplexity": 99.0})
    with writing_records(log, folder):
        line = f"fedgraft-record rounds.jsonl {json.dumps(ROWS[1])}\n"
        log.write_text(
            f"{line}fedgraft-record rounds.jsonl {json.dumps(ROWS[2])}"
        )  # the last line is not complete
        deadline = time.monotonic() + 20
        while read_rounds(folder) != ROWS[:2] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_rounds(folder) == ROWS[:2]
        with log.open("a") as file:
            file.write("\n")
    assert read_rounds(folder) == ROWS
