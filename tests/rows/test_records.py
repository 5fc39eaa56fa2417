"""Rows: the schema, the append-only file, and what happens when something goes wrong while writing."""

import errno
import json
import multiprocessing
import os
import shutil
import warnings

import pandas as pd
import pytest

from vitbench.base.errors import InputError
from vitbench.rows import records, row_table
from vitbench.rows.records import Row, append_rows, read_rows
from vitbench.rows.row_table import load_records


def row(**changes):
    values = {
        "model": "m",
        "dataset": "d",
        "data_fingerprint": "f",
        "method": "baseline",
        "metric": "top1",
        "value": 0.9,
    }
    return Row(**{**values, "unit": "fraction", "source": "measured: test", **changes})


def test_rows_come_back_as_they_went(tmp_path):
    wanted = row(samples=[1.0, 2.5], context={"batch": 1, "threads": 2}, config={"methods": []}, low=0.8, high=0.95)
    append_rows(tmp_path / "records.jsonl", [wanted])
    (found,) = read_rows(tmp_path)
    assert found.value == 0.9
    assert found.samples == [1.0, 2.5]
    assert len(found.key) == 16
    frame = load_records(tmp_path)
    assert (frame.loc[0, "batch"], frame.loc[0, "threads"]) == (1, 2)


def test_a_line_is_one_json_object_with_the_schemas_fields(tmp_path):
    append_rows(tmp_path / "records.jsonl", [row(), row(metric="bytes", value=10)])
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{*Row.model_fields, "check"}] * 2


def test_what_is_there_is_not_added_again(tmp_path):
    file = tmp_path / "records.jsonl"
    assert append_rows(file, [row()]) == 1
    assert append_rows(file, [row(value=0.1)]) == 0
    assert append_rows(file, [row(seed=1)]) == 1
    assert append_rows(file, [row(context={"artifact": "other"})]) == 1
    assert len(read_rows(file)) == 3


def test_a_failed_row_can_be_followed_by_a_good_one(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row(status="failed", value=None, source="", error="out of memory")])
    assert append_rows(file, [row()]) == 1
    assert list(load_records(file)["status"]) == ["ok"]
    assert list(load_records(file, latest=False)["status"]) == ["failed", "ok"]


def test_of_two_artifacts_the_later_is_read(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row(value=value, context={"artifact": str(value), "batch": 1}) for value in (0.1, 0.2)])
    append_rows(file, [row(value=0.3, context={"artifact": "x", "batch": 8})])
    assert list(load_records(file)["value"]) == [0.2, 0.3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": None}, "needs a finite value"),
        ({"source": "guessed"}, "does not start with measured, modelled or estimated"),
        ({"status": "failed"}, "needs an error"),
        ({"status": "perhaps"}, "status = 'perhaps'"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"value": float("nan")}, "finite"),
    ],
)
def test_rows_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        row(**changes)


def test_what_a_killed_writer_left_is_no_row_and_is_put_aside(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row(), row(seed=1)])
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    for read in (read_rows, load_records):
        with pytest.warns(UserWarning, match="the last line of .* is incomplete"):
            assert len(read(file)) == 1
    assert append_rows(file, [row(seed=1), row(seed=2)]) == 2
    assert [found.seed for found in read_rows(file)] == [0, 1, 2]
    assert (tmp_path / "records.jsonl.torn").read_bytes() == whole.splitlines(keepends=True)[1][:-20] + b"\n"


def test_a_file_that_was_put_in_the_place_of_another_is_read_anew(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row(seed=seed) for seed in range(3)])
    file.unlink()
    assert append_rows(file, [row(seed=seed) for seed in range(3)]) == 3
    other = tmp_path / "other.jsonl"
    append_rows(other, [row(seed=seed) for seed in range(10, 20)])
    file.write_bytes(other.read_bytes())
    assert append_rows(file, [row(seed=1), row(seed=12)]) == 1


@pytest.mark.parametrize("place", range(30, 700, 23))
def test_a_flipped_bit_is_never_another_number(tmp_path, place):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row(), row(seed=1, samples=[1.0, 2.0], low=0.8, high=0.9)])
    text = bytearray(file.read_bytes())
    text[place % len(text)] ^= 1
    file.write_bytes(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _rows_or_error(read_rows, file) == _rows_or_error(load_records, file) != 2


def _rows_or_error(read, file):
    """How many rows there are, which are fewer where the end of the last line was hit; or what is said of the file."""
    try:
        return len(read(file))
    except InputError as error:
        return str(error)


def test_fast_and_slow_reading_are_one(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(
        file,
        [
            row(config={"methods": [{"method": "m", "config": {"seed": 1, "metric": "x", "context": {}}}]}, hits="0f"),
            row(method="a", context={"layers": ["b"], "batch": 1, "odd": '","context":{}'}, samples=[1.0], low=0.5),
            row(method="b", status="failed", value=None, source="", error='it said "config":{"a":1},"seed":2 \\ and ä'),
            row(method="c", value=7, metric="bytes", seed=-3),
        ],
    )
    slow = [found.model_dump() for found in read_rows(file)]
    fast = load_records(file)
    assert len(row_table._read(file).frame) == 4
    for name in Row.model_fields:
        assert [None if isinstance(x, float) and x != x else x for x in fast[name]] == [each[name] for each in slow]


def test_a_table_that_its_reader_changes_is_read_whole_again(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row(method="a", context={"batch": 1}), row(method="b", context={"batch": 1})])
    for latest in (True, False):
        kept = load_records(file, latest=latest)
        own = load_records(file, latest=latest)
        own["value"], own["label"] = 0.0, "mine"
        own.loc[0, "method"] = "changed"
        pd.testing.assert_frame_equal(load_records(file, latest=latest), kept)


def test_of_a_file_that_grew_the_new_lines_are_parsed_and_of_a_changed_one_all(tmp_path, monkeypatch):
    file, parsed = tmp_path / "records.jsonl", []
    inner = row_table._parsed
    monkeypatch.setattr(row_table, "_parsed", lambda lines, shared: parsed.append(len(lines)) or inner(lines, shared))
    for count in (1, 2, 3):
        append_rows(file, [row(method=f"m{count}", context={"batch": count})])
        frame = load_records(file)
        assert list(frame["batch"]) == list(range(1, count + 1))
    assert parsed == [1, 1, 1]
    load_records(file)
    shutil.copy(file, tmp_path / "at_once.jsonl")
    assert dict(load_records(file).dtypes) == dict(load_records(tmp_path / "at_once.jsonl").dtypes)
    del parsed[3:]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    assert list(load_records(file)["batch"]) == [2, 3]
    assert parsed[3:] == [2]
    file.write_text(lines[1] + lines[2].replace('"value":', '"value":1'))
    with pytest.raises(InputError, match="line 2"):
        load_records(file)


def test_rows_of_before_there_were_checksums_are_read(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row()])
    file.write_text(file.read_text().split(',"check"')[0] + "}\n")
    assert len(read_rows(file)) == len(load_records(file)) == 1


def test_a_foreign_line_is_named(tmp_path):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row()])
    file.write_text(file.read_text() + '{"schema_version": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_rows(file)


def test_a_full_disk_takes_nothing_with_it(tmp_path, monkeypatch):
    file = tmp_path / "records.jsonl"
    append_rows(file, [row()])
    before, write = file.read_bytes(), os.write

    def full(handle, data):
        if b"metric" in data and len(data) > 100:
            return write(handle, data[:60])  # part of it still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        records.os, "write", lambda handle, data: full(handle, data) if len(data) > 100 else full(handle, b"")
    )
    with pytest.raises(InputError, match="No space left"):
        append_rows(file, [row(seed=seed) for seed in (1, 2)])
    assert file.read_bytes() == before


def _write_some(file, writer):
    for i in range(20):
        append_rows(file, [row(seed=writer * 1000 + i), row(seed=i, method="shared")])


def test_several_writers_lose_nothing_and_double_nothing(tmp_path):
    file = tmp_path / "records.jsonl"
    writers = [multiprocessing.get_context("fork").Process(target=_write_some, args=(file, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_rows(file)
    assert len(rows) == 4 * 20 + 20
    assert len({found.key for found in rows}) == len(rows)


def test_no_records(tmp_path):
    with pytest.raises(InputError, match="no records at"):
        read_rows(tmp_path)
