"""metrics.jsonl: one JSON object a step, valid after any crash and continued after a resume."""

import json
import math
import os
import pathlib


class MetricsFile:
    """Appends one line a step; a line is complete on disk before the next step begins.

    What cannot be written is kept in memory and written when there is room again.
    """

    def __init__(self, path, keep_until_step: int = 0):
        """Drops what a former run wrote after `keep_until_step` (0: everything) and continues."""
        self._path = pathlib.Path(path)
        kept = [record for record in read_metrics(path) if record["step"] <= keep_until_step]
        # Written beside and renamed: a crash here loses nothing.
        beside = self._path.with_name(self._path.name + ".new")
        beside.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(beside, self._path)
        # No buffer between: what was not written is known to the byte.
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._waiting = b""
        self.problem: OSError | None = None
        """Why lines are kept in memory at the moment; None if none are."""

    def append(self, record: dict) -> None:
        """Write {"step": ..., name: number or list of numbers, ...}; what is not finite is null."""
        self._waiting += _line(record).encode()
        try:
            # From where the last attempt broke off, be it within a line.
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
            self.problem = None
        except OSError as error:
            self.problem = error

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def read_metrics(path) -> list[dict]:
    """Every complete record of a metrics file, in order; [] if there is no file.

    A last line cut short by a crash is passed over. Raises ValueError, with its number, on any
    other line that is not a record.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    complete, rest = lines[:-1], lines[-1]
    records = []
    for number, line in enumerate(complete, start=1):
        record = _parse(line)
        if record is None:
            if number == len(complete) and not rest:
                break  # the file system may keep a torn block of the last line
            raise ValueError(
                f"{path}, line {number}, is not a JSON object with a step: {line[:60]!r}. "
                "Repair or remove the line."
            )
        records.append(record)
    return records


def _parse(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _line(record: dict) -> str:
    return json.dumps(_safe(record), allow_nan=False) + "\n"


def _safe(value):
    if isinstance(value, dict):
        return {name: _safe(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_safe(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
