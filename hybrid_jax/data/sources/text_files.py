"""One document a file."""

import pathlib
from collections.abc import Iterator

from hybrid_jax.data.sources import records
from hybrid_jax.data.sources.records import Record, Skipped, Unit

_UNIT_BYTES = 16 << 20


def units(files: list[tuple[str, pathlib.Path]]) -> list[Unit]:
    """Files in order, as many together as make some megabytes."""
    groups: list[list[tuple[str, str]]] = []
    size = _UNIT_BYTES
    for name, path in files:
        if size >= _UNIT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, str(path)))
        size += path.stat().st_size
    return [Unit("text", tuple(group), 0, len(group)) for group in groups]


def read(unit: Unit) -> Iterator[Record | Skipped]:
    """The documents of a unit."""
    for name, file in unit.files:
        path = pathlib.Path(file)
        try:
            if path.stat().st_size > records.MAX_BYTES:
                yield Skipped(name, records.TOO_LONG)
                continue
            text = records.decoded(name, path.read_bytes())
        except OSError as error:
            yield Skipped(name, "cannot be read", error.strerror or str(error))
            continue
        yield text if isinstance(text, Skipped) else Record(name, text)
