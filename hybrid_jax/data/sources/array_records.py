"""ArrayRecord files, through Grain: each record a JSON object or a text."""

import pathlib
from collections.abc import Iterator

import grain

from hybrid_jax.data.sources import json_lines, records
from hybrid_jax.data.sources.records import Record, Skipped, Unit

_UNIT_RECORDS = 1 << 14


def units(name: str, path: pathlib.Path) -> list[Unit]:
    """Ranges of records."""
    try:
        count = len(_open(path))
    except Exception as error:
        raise ValueError(f"{path} is not an ArrayRecord file: {error}") from error
    files = ((name, str(path)),)
    return [
        Unit("arrayrecord", files, begin, min(begin + _UNIT_RECORDS, count))
        for begin in range(0, count, _UNIT_RECORDS)
    ]


def read(unit: Unit) -> Iterator[Record | Skipped]:
    """The records of a range, named by their number."""
    ((name, path),) = unit.files
    opened = _open(path)
    for number in range(unit.begin, unit.end):
        here = f"{name}:{number}"
        try:
            data = opened[number]
        except Exception as error:  # as the library raises it
            yield Skipped(here, "cannot be read", str(error))
            continue
        yield _record(here, data)


def _record(name: str, data: bytes) -> Record | Skipped:
    if len(data) > records.MAX_BYTES:
        return Skipped(name, records.TOO_LONG)
    if data.lstrip().startswith(b"{"):
        parsed = json_lines.parse(name, data)
        if isinstance(parsed, Record):
            return parsed
    text = records.decoded(name, data)
    return text if isinstance(text, Skipped) else Record(name, text)


def _open(path):
    return grain.sources.ArrayRecordDataSource([str(path)])
