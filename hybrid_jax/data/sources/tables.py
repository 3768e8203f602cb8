"""Parquet files and Arrow files (Hugging Face data sets on disk): one row a record."""

import json
import pathlib
from collections.abc import Iterator

from hybrid_jax.data.sources.records import Record, Skipped, Unit

_ROWS_AT_A_TIME = 256


def parquet_units(name: str, path: pathlib.Path) -> list[Unit]:
    """One a row group."""
    from pyarrow import parquet

    try:
        groups = parquet.ParquetFile(path).num_row_groups
    except Exception as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    files = ((name, str(path)),)
    return [Unit("parquet", files, group, group + 1) for group in range(groups)]


def read_parquet(unit: Unit) -> Iterator[Record | Skipped]:
    """The rows of a row group, named by group and row."""
    from pyarrow import parquet

    ((name, path),) = unit.files
    here = f"{name}:{unit.begin}"
    try:
        # Pages are decoded a few rows at a time: memory holds those, not the group.
        batches = parquet.ParquetFile(path).iter_batches(
            batch_size=_ROWS_AT_A_TIME, row_groups=[unit.begin]
        )
        yield from _rows(here, batches)
    except Exception as error:  # pyarrow's own errors share no base but Exception
        yield Skipped(here, "cannot be read to its end", str(error))


def arrow_units(name: str, path: pathlib.Path) -> list[Unit]:
    """One a file: its batches can only be read in order."""
    return [Unit("arrow", ((name, str(path)),), 0, 1)]


def read_arrow(unit: Unit) -> Iterator[Record | Skipped]:
    """The rows of an Arrow stream or file, named by their number."""
    import pyarrow as pa

    ((name, path),) = unit.files
    try:
        with pa.memory_map(path) as file:
            yield from _rows(name, _arrow_batches(pa, file))
    except Exception as error:
        yield Skipped(name, "cannot be read to its end", str(error))


def _arrow_batches(pa, file):
    """Data sets on disk are streams; other writers make files with an index."""
    try:
        reader = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        indexed = pa.ipc.open_file(file)
        reader = (indexed.get_batch(idx) for idx in range(indexed.num_record_batches))
    for batch in reader:
        for begin in range(0, batch.num_rows, _ROWS_AT_A_TIME):
            yield batch.slice(begin, _ROWS_AT_A_TIME)


def _rows(name: str, batches) -> Iterator[Record]:
    row = 0
    for batch in batches:
        for fields in batch.to_pylist():
            yield Record(f"{name}:{row}", fields)
            row += 1


def data_set_files(path: pathlib.Path) -> list[tuple[str, pathlib.Path]] | None:
    """(name, file) of a Hugging Face data set on disk, in order; None if `path` is none.

    Of several splits the one called train is taken. Raises ValueError if there are only others.
    """
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits:
            raise ValueError(
                f"{path} holds the splits {splits}, none called train; give the directory of one, "
                f"such as {path / splits[0]}."
            )
        return data_set_files(path / "train")
    state = path / "state.json"
    if not (state.is_file() and (path / "dataset_info.json").is_file()):
        return None
    names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    return [(name, path / name) for name in names]
