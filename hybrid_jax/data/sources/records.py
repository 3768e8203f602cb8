"""What every format is read into: records with a stable name, and what had to be left out."""

from typing import Any, NamedTuple

# One document longer than this is left out: it would not fit beside the others in memory.
MAX_BYTES = 1 << 28


class Record(NamedTuple):
    """One document as it was found."""

    name: str
    """Path below the source's root and place in the file; the same on every machine."""
    content: str | dict[str, Any]
    """A text, or the fields of a record."""


class Skipped(NamedTuple):
    """One that cannot be used."""

    name: str
    reason: str
    """In a few words that are the same for all of a kind, so that they can be counted."""
    detail: str = ""
    """What is particular to this one."""


class Unit(NamedTuple):
    """A part of a source that is tokenised in one go; depends on the files alone."""

    format: str
    files: tuple[tuple[str, str], ...]
    """(name, path) of each file; one but for text."""
    begin: int
    end: int
    """Which part of the file: bytes, rows, row groups or batches, as the format has it."""


def decoded(name: str, data: bytes) -> str | Skipped:
    """Text of bytes; line ends stay as they are."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(name, "not UTF-8", f"byte {error.start}")
    return text if text else Skipped(name, "empty")


TOO_LONG = f"longer than {MAX_BYTES >> 20} MiB"
