"""What each process does in `test_fault_processes.py`: it trains, and some of it goes wrong.

    python -m tests.training.poisoned POSITIONS FAILING_STEPS train ...

Batches at POSITIONS hold a NaN in the rows of process 1 alone; checkpoints of FAILING_STEPS cannot
be finished by process 0, which alone finishes them.
"""

import json
import sys

import jax
import numpy as np

from hybrid_jax import cli
from hybrid_jax.checkpoint import manifest
from hybrid_jax.training import loop


def main() -> int:
    positions, failing = (json.loads(word) for word in sys.argv[1:3])
    honest, write = loop.Trainer._next_batch, manifest.write

    def poisoned(self):
        taken = honest(self)
        if taken.position - 1 not in positions or jax.process_index() != 1:
            return taken
        weights = taken.own.weights_BT.copy()
        weights[0, 0] = np.nan
        own = taken.own._replace(weights_BT=weights)
        return taken._replace(own=own, batch=self._feed.place(own))

    def failed(path, arrays):
        if int(path.name) in failing:
            raise OSError("no space left")
        write(path, arrays)

    loop.Trainer._next_batch = poisoned
    manifest.write = failed
    return cli.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
