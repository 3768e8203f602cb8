"""Means by a number's power of two: 1, 2, 3 to 4, 5 to 8, and so on."""

from typing import NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """The mean of what fell between two numbers, both included."""

    first: int
    last: int
    mean: float
    size: int


def by_power_of_two(numbers: np.ndarray, values: np.ndarray) -> list[Bucket]:
    """Buckets of `values` by `numbers` >= 1, in order; empty ones are left out."""
    upper = np.ceil(np.log2(np.asarray(numbers, np.float64))).astype(np.int64)
    counts = np.bincount(upper)
    sums = np.bincount(upper, weights=np.asarray(values, np.float64))
    return [
        Bucket((1 << int(k)) // 2 + 1, 1 << int(k), float(sums[k] / counts[k]), int(counts[k]))
        for k in np.flatnonzero(counts)
    ]
