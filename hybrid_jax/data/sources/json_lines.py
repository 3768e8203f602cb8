"""JSON Lines, plain or gzipped: one object a line."""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

from hybrid_jax.data.sources import records
from hybrid_jax.data.sources.records import Record, Skipped, Unit

_UNIT_BYTES = 32 << 20


def units(name: str, path: pathlib.Path) -> list[Unit]:
    """Ranges of bytes; a line belongs to the range it begins in. A gzipped file is one unit."""
    size = path.stat().st_size
    step = max(size, 1) if _is_gzipped(path) else _UNIT_BYTES
    files = ((name, str(path)),)
    return [
        Unit("jsonl", files, begin, min(begin + step, size))
        for begin in range(0, max(size, 1), step)
    ]


def read(unit: Unit) -> Iterator[Record | Skipped]:
    """The records whose lines begin in the unit's bytes, named by the file and that byte."""
    ((name, path),) = unit.files
    zipped = _is_gzipped(pathlib.Path(path))
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            yield from _lines(name, file, unit.begin, None if zipped else unit.end)
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(name, "cannot be read to its end", str(error))


def _lines(name: str, file, begin: int, end: int | None) -> Iterator[Record | Skipped]:
    if begin:
        # The line that the byte before belongs to is another unit's.
        file.seek(begin - 1)
        while (part := file.readline(records.MAX_BYTES)) and not part.endswith(b"\n"):
            pass
    place = file.tell()
    while end is None or place < end:
        line = file.readline(records.MAX_BYTES + 1)
        if not line:
            return
        here, length = f"{name}:{place}", len(line)
        if length > records.MAX_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(records.MAX_BYTES)
                length += len(line)
            yield Skipped(here, records.TOO_LONG)
        elif line.strip():
            yield parse(here, line)
        place += length


def parse(name: str, line: bytes) -> Record | Skipped:
    """One line, or one JSON text."""
    text = records.decoded(name, line)
    if isinstance(text, Skipped):
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Skipped(name, "broken JSON", str(error))
    if not isinstance(fields, dict):
        return Skipped(name, "not a JSON object", type(fields).__name__)
    return Record(name, fields)


def _is_gzipped(path: pathlib.Path) -> bool:
    return path.suffix == ".gz"
