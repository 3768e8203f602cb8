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
from hybrid_jax.data import Batches


def main() -> int:
    positions, failing = (json.loads(word) for word in sys.argv[1:3])
    honest, write = Batches.__next__, manifest.write

    def poisoned(self):
        number, batch = self.position["batches"], honest(self)
        if number in positions and jax.process_index() == 1:
            batch.weights_BT[0, 0] = np.nan
        return batch

    def failed(path, *arguments):
        if int(path.name) in failing:
            raise OSError("no space left")
        return write(path, *arguments)

    Batches.__next__ = poisoned
    manifest.write = failed
    return cli.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
