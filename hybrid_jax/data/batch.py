"""What one update sees: tokens, their targets, and where each document begins and ends."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of packed documents; a pytree of arrays of equal shape.

    Padding stands at the end of a row with segment id 0, position 0 and weight 0.
    """

    tokens_BT: np.ndarray
    """int32 inputs."""
    targets_BT: np.ndarray
    """int32 token that follows each input in the same document."""
    segment_ids_BT: np.ndarray | None
    """int32, from 1 in each row, one number a document (or piece of one); 0 is padding.
    None: every row is one segment without padding."""
    positions_BT: np.ndarray
    """int32, from 0 in each segment."""
    weights_BT: np.ndarray
    """float32 weight of each target in the loss."""
    sources_BT: np.ndarray | None = None
    """int32 number of the source that each token is from. None: there is one."""


def stack(rows) -> Batch:
    """Rows of length T as one batch [B, T]."""
    columns = zip(*rows, strict=True)
    return Batch._make(None if column[0] is None else np.stack(column) for column in columns)


def empty_like(row: Batch) -> Batch:
    """A row of padding alone."""
    return Batch._make(None if column is None else np.zeros_like(column) for column in row)
