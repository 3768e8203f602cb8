"""Every format gives the same records, in stable units; what cannot be used is named."""

import gzip
import json

import datasets
import pyarrow as pa
import pytest
from array_record.python import array_record_module
from pyarrow import parquet

from hybrid_jax.config.data import Source
from hybrid_jax.data import encoding, sources
from hybrid_jax.data.sources import json_lines, records

TEXTS = [f"document {number}: é 漢字" for number in range(5)]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


def read(path, **options):
    """(texts, what was left out) of everything at a path."""
    source = Source(path=str(path), **options)
    found = [record for unit in sources.units(source) for record in sources.read(unit)]
    texts = [
        record if isinstance(record, sources.Skipped) else encoding.text_of(source, record)
        for record in found
    ]
    return (
        [text for text in texts if isinstance(text, str)],
        [text for text in texts if not isinstance(text, str)],
    )


def write_json_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_array_records(path, payloads):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()


@pytest.mark.parametrize(
    "kind", ["text", "jsonl", "jsonl.gz", "parquet", "arrayrecord", "data set", "splits"]
)
def test_every_format_gives_the_same_texts(tmp_path, kind):
    path = tmp_path / "data"
    path.mkdir()
    match kind:
        case "text":
            for number, text in enumerate(TEXTS):
                (path / f"{number}.txt").write_text(text)
        case "jsonl":
            write_json_lines(path / "a.jsonl")
        case "jsonl.gz":
            with gzip.open(path / "a.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in ROWS)
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(ROWS), path / "a.parquet", row_group_size=2)
        case "arrayrecord":
            # Objects and plain texts may be mixed.
            payloads = [json.dumps(row).encode() for row in ROWS[:3]]
            write_array_records(
                path / "a.array_record", payloads + [text.encode() for text in TEXTS[3:]]
            )
        case "data set":
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        case "splits":
            train = datasets.Dataset.from_list(ROWS)
            datasets.DatasetDict({"train": train, "test": train}).save_to_disk(path)
    assert read(path) == (TEXTS, [])


def test_a_line_belongs_to_the_range_it_begins_in(tmp_path, monkeypatch):
    write_json_lines(tmp_path / "a.jsonl")
    whole = read(tmp_path)[0]
    # Ranges shorter than a line, and ones that end at a line's end.
    for size in (7, 64, len(json.dumps(ROWS[0])) + 1):
        monkeypatch.setattr(json_lines, "_UNIT_BYTES", size)
        assert read(tmp_path)[0] == whole


def test_bad_records_are_named_and_the_others_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_BYTES", 200)
    lines = [
        json.dumps(ROWS[0]).encode(),
        b'{"text": "cut',
        b'{"text": "\xe9"}',
        b'{"text": ""}',
        b'{"other": "x"}',
        b'{"text": "\\ud800"}',
        b"[1]",
        b'{"text": 5}',
        b'{"text": "' + b"x" * 300 + b'"}',
        json.dumps(ROWS[1]).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt").write_text("y" * 300)
    texts, skipped = read(tmp_path)
    assert texts == TEXTS[:2]
    reasons = [each.reason for each in skipped]
    assert sorted(reasons) == sorted(
        ["broken JSON", "not UTF-8", "empty", "no field 'text'", "not UTF-8", "not a JSON object"]
        + ["not a text", records.TOO_LONG, "not UTF-8", "empty", records.TOO_LONG]
    )
    begins = len(lines[0]) + 1
    broken = next(each for each in skipped if each.reason == "broken JSON")
    assert broken.name == f"a.jsonl:{begins}"
    assert "fields: other" in next(e for e in skipped if e.reason.startswith("no field")).detail


def test_files_that_are_not_what_they_are_called(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"a.parquet is not a Parquet file"):
        read(tmp_path)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.array_record").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a.array_record is not an ArrayRecord file"):
        read(tmp_path)
    (tmp_path / "a.array_record").unlink()
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 400).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    texts, (cut,) = read(tmp_path)
    assert texts[:5] == TEXTS and cut.reason == "cannot be read to its end"


def test_a_data_set_without_a_train_split_says_what_there_is(tmp_path):
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"splits \['dev'\], none called train.*d/dev"):
        read(tmp_path / "d")


def test_a_format_can_be_forced(tmp_path):
    write_json_lines(tmp_path / "a.jsonl")
    (text,), _ = read(tmp_path, format="text")
    assert text.count("\n") == 5
    (tmp_path / "b.log").write_text(json.dumps(ROWS[0]) + "\n")
    assert read(tmp_path / "b.log", format="jsonl")[0] == TEXTS[:1]
