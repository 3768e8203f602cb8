"""Tokenised documents on disk, a shard for each unit of a source.

Shard NNNNN is NNNNN.ids.npy (uint16 or uint32), NNNNN.documents.npy (`DOCUMENT`), NNNNN.learned.npy
(bool, one a token) if not every token is learned, and NNNNN.json, which is written last: without it
the shard is not there.
"""

import json
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import xxhash

from hybrid_jax.data.encoding import Encoded
from hybrid_jax.data.sources import Skipped
from hybrid_jax.data.split import is_heldout

DOCUMENT = np.dtype([("begin", "<i8"), ("length", "<i8"), ("heldout", "?"), ("hash", "V16")])
"""A document: where its tokens are, whether it is held out, and the xxh3-128 of its text."""
# As many of what was left out are named; all are counted.
_NAMED = 100


class Facts(NamedTuple):
    """What NNNNN.json says."""

    documents: int
    tokens: int
    masked: bool
    """Whether some tokens are not learned."""
    largest: int
    """The largest id; -1 without tokens."""
    hash: str
    """xxh3-128 of all arrays."""
    skipped: dict[str, int]
    """Reason -> how many records were left out."""
    named: list[list[str]]
    """[name, reason, detail] of the first of them."""


class Shard(NamedTuple):
    """One shard, memory-mapped."""

    ids: np.ndarray
    learned: np.ndarray | None
    documents: np.ndarray
    facts: Facts


def write(
    directory: pathlib.Path,
    number: int,
    encoded: Iterable[Encoded | Skipped],
    *,
    vocab_size: int,
    heldout_fraction: float,
) -> Facts:
    """Store a unit's documents as shard `number`."""
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    documents: list[tuple] = []
    named: list[list[str]] = []
    counts: Counter[str] = Counter()
    begin = 0
    for item in encoded:
        if isinstance(item, Skipped):
            counts[item.reason] += 1
            if len(named) < _NAMED:
                named.append([item.name, item.reason, item.detail[:200]])
            continue
        text_hash = xxhash.xxh3_128_digest(item.text.encode("utf-8", "surrogatepass"))
        heldout = is_heldout(item.name, heldout_fraction)
        documents.append((begin, len(item.ids), heldout, text_hash))
        ids.append(item.ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32))
        learned.append(np.ones(len(item.ids), bool) if item.learned is None else item.learned)
        begin += len(item.ids)
    all_ids = np.concatenate(ids) if ids else np.zeros(0, np.uint16)
    all_learned = np.concatenate(learned) if learned else np.zeros(0, bool)
    table = np.array(documents, DOCUMENT)
    masked = not all_learned.all()
    arrays = {"ids": all_ids, "documents": table} | ({"learned": all_learned} if masked else {})
    for what, array in arrays.items():
        np.save(_path(directory, number, what), array)
    facts = Facts(
        len(table),
        len(all_ids),
        bool(masked),
        int(np.max(all_ids)) if len(all_ids) else -1,
        array_hash(arrays),
        dict(counts),
        named,
    )
    write_whole(directory / f"{number:05}.json", json.dumps(facts._asdict()) + "\n")
    return facts


def read_facts(directory: pathlib.Path, number: int) -> Facts | None:
    """What is known of a shard; None if it is not there or not whole."""
    try:
        facts = Facts(**json.loads((directory / f"{number:05}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    wanted = ["ids", "documents"] + ["learned"] * facts.masked
    return facts if all(_path(directory, number, what).is_file() for what in wanted) else None


def load(directory: pathlib.Path, number: int) -> Shard:
    """Memory-map a shard. Raises ValueError if it is missing or not as its facts say."""
    facts = read_facts(directory, number)
    if facts is None:
        raise ValueError(f"the shard {directory / f'{number:05}'} is missing")
    try:
        ids = np.load(_path(directory, number, "ids"), mmap_mode="r", allow_pickle=False)
        documents = np.load(_path(directory, number, "documents"), allow_pickle=False)
        learned = None
        if facts.masked:
            learned = np.load(_path(directory, number, "learned"), "r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the shard {directory / f'{number:05}'} is damaged ({error})") from error
    lengths = (len(ids), len(documents), len(ids) if learned is None else len(learned))
    if lengths != (facts.tokens, facts.documents, facts.tokens):
        raise ValueError(f"the shard {directory / f'{number:05}'} does not match its own record")
    return Shard(ids, learned, documents, facts)


def verify(directory: pathlib.Path, number: int) -> None:
    """Read a whole shard. Raises ValueError if it is not what was written."""
    shard = load(directory, number)
    arrays = {"ids": shard.ids, "documents": shard.documents}
    if shard.learned is not None:
        arrays["learned"] = shard.learned
    if array_hash(arrays) != shard.facts.hash:
        raise ValueError(f"the shard {directory / f'{number:05}'} is damaged (checksum)")


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _path(directory: pathlib.Path, number: int, what: str) -> pathlib.Path:
    return directory / f"{number:05}.{what}.npy"


def array_hash(arrays: dict[str, np.ndarray]) -> str:
    """xxh3-128 over names, dtypes, lengths and bytes."""
    digest = xxhash.xxh3_128()
    for what in sorted(arrays):
        digest.update(f"{what}:{arrays[what].dtype.str}:{len(arrays[what])};".encode())
        digest.update(np.ascontiguousarray(arrays[what]).view(np.uint8).data)
    return digest.hexdigest()
