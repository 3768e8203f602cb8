"""Where documents come from: formats told apart by file, cut into units, read record by record."""

import pathlib
from collections.abc import Iterator

from hybrid_jax.config.data import Source
from hybrid_jax.data import files as files_lib
from hybrid_jax.data.sources import array_records, json_lines, tables, text_files
from hybrid_jax.data.sources.records import Record, Skipped, Unit

__all__ = ["Record", "Skipped", "Unit", "read", "units"]

_ENDINGS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".array_record": "arrayrecord",
    ".arrayrecord": "arrayrecord",
    ".arrow": "arrow",
}
_UNITS = {
    "jsonl": json_lines.units,
    "parquet": tables.parquet_units,
    "arrayrecord": array_records.units,
    "arrow": tables.arrow_units,
}
_READ = {
    "text": text_files.read,
    "jsonl": json_lines.read,
    "parquet": tables.read_parquet,
    "arrayrecord": array_records.read,
    "arrow": tables.read_arrow,
}


def units(source: Source) -> list[Unit]:
    """The source's parts, in an order that the files alone decide.

    Raises FileNotFoundError or ValueError if there is nothing at its path.
    """
    found = tables.data_set_files(pathlib.Path(source.path).expanduser())
    if found is None:
        found = files_lib.find_files(source.path, source.pattern, source.exclude)
    texts = [pair for pair in found if _format(source, pair[0]) == "text"]
    every = text_files.units(texts)
    for name, path in found:
        format_ = _format(source, name)
        if format_ != "text":
            every += _UNITS[format_](name, path)
    return every


def read(unit: Unit) -> Iterator[Record | Skipped]:
    """Everything in a unit, in order; what cannot be used says so."""
    return _READ[unit.format](unit)


def _format(source: Source, name: str) -> str:
    if source.format != "auto":
        return source.format
    return next((kind for end, kind in _ENDINGS.items() if name.lower().endswith(end)), "text")
