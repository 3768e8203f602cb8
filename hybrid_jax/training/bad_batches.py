"""Batches whose updates were skipped, written out for whoever looks for the reason."""

import json
import pathlib

import jax
import numpy as np

from hybrid_jax.training.supply import Supplied

# More tell nothing new, and a disk is finite.
KEEP = 16


def write(directory: pathlib.Path, step: int, supplied: Supplied) -> pathlib.Path:
    """Store this process's rows of a batch as DIRECTORY/step-N.npz; the newest 16 files are kept.

    With several processes each writes step-N-process-P.npz. Beside the batch's arrays stand `rows`,
    their numbers in the global batch, and `position`, where the data goes on after it, as JSON.
    Raises OSError.
    """
    several = jax.process_count() > 1
    ending = f"-process-{jax.process_index()}.npz" if several else ".npz"
    directory.mkdir(exist_ok=True)
    arrays = {k: v for k, v in supplied.own._asdict().items() if v is not None}
    path = directory / f"step-{step}{ending}"
    # A numpy file is read back whole or not at all: no need for a draft beside it.
    position = json.dumps(supplied.position)
    np.savez(path, rows=np.asarray(supplied.rows), position=position, **arrays)
    mine = directory.glob(f"step-*{ending}") if several else directory.glob("step-*.npz")
    numbered = sorted(mine, key=lambda file: int(file.name.split("-")[1].split(".")[0]))
    for old in numbered[:-KEEP]:
        old.unlink(missing_ok=True)
    return path
