"""A digest of parameters that is made of parts, in any order and however they are cut."""

import json
from collections.abc import Mapping

import jax
import numpy as np
import xxhash

from hybrid_jax.checkpoint.boxes import Box
from sharding import processes

# Values that are widened at a time; they stay in a core's cache.
_PIECE = 1 << 17
_COLUMNS, _ROWS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


class Fingerprint:
    """Sums over values, modulo 2**64, one a parameter.

    A value's bits count as often as two numbers say that are drawn for its row (all dims but the
    last) and its column. A sum asks for no order: who holds a part adds it up alone, and the mesh
    and the number of processes make no difference.
    """

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def add(self, name: str, shape: tuple[int, ...], place: Box, values: np.ndarray) -> None:
        """Values of a parameter of this shape; each of its values must be given once."""
        width = values.shape[-1] if values.ndim else 1
        table = np.ascontiguousarray(values).reshape(-1, width)
        bits = table.view(f"u{values.itemsize}")
        begin, end = (place.begin, place.end) if values.ndim else ((0,), (1,))
        columns = _drawn(np.arange(begin[-1], end[-1], dtype=np.uint64), _COLUMNS)
        rows = _drawn(_rows(shape, begin[:-1], end[:-1]), _ROWS)
        total, step = 0, max(1, _PIECE // max(width, 1))
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            total += int((bits[some].astype(np.uint64) @ columns) @ rows[some])
        self._sums[name] = (self._sums.get(name, 0) + total) % 2**64

    def digest(self, forms: Mapping[str, jax.ShapeDtypeStruct]) -> str:
        """Hexadecimal xxh3-128 of names, shapes, dtypes and the sums of all processes.

        All processes call it. Equal parameters have equal digests. Others have not, but for
        accidents of 1 in 2**32 at most (values that differ in nothing but their highest bits, else
        rarer by far); whoever looks for two that have can find them.
        """
        said = [json.loads(text) for text in processes.gather(json.dumps(self._sums))]
        whole = xxhash.xxh3_128()
        for name in sorted(forms):
            form, total = forms[name], sum(each.get(name, 0) for each in said) % 2**64
            whole.update(f"{name} {form.dtype}{list(form.shape)} {total:016x}\n".encode())
        return whole.hexdigest()


def _rows(shape: tuple[int, ...], begin: tuple[int, ...], end: tuple[int, ...]) -> np.ndarray:
    """Numbers of rows in the whole array, of those in a box of its outer dims."""
    rows = np.zeros((1,), np.uint64)
    for dim, (first, last) in enumerate(zip(begin, end, strict=True)):
        inner = np.arange(first, last, dtype=np.uint64)
        rows = (rows[:, None] * np.uint64(shape[dim]) + inner[None, :]).reshape(-1)
    return rows


def _drawn(numbers: np.ndarray, seed: np.uint64) -> np.ndarray:
    """Odd numbers that look random: SplitMix64 (Steele et al., OOPSLA 2014) of each."""
    x = (numbers + np.uint64(1)) * seed
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
