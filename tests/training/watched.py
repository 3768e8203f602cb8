"""`hybrid-jax train` that notes the rows it feeds: `python -m tests.training.watched LOG ARGS...`.

A line a batch goes to LOG.<process>: {row: hash of its tokens}.
"""

import hashlib
import json
import sys

import numpy as np

from hybrid_jax import cli
from hybrid_jax.training.supply import Supply


def main(log: str, *arguments: str) -> int:
    import jax

    following = Supply.next

    def and_note(self):
        supplied = following(self)
        rows = {
            row: hashlib.sha256(np.asarray(own).tobytes()).hexdigest()
            for row, own in zip(supplied.rows, supplied.own.tokens_BT, strict=True)
        }
        with open(f"{log}.{jax.process_index()}", "a") as file:
            file.write(json.dumps(rows) + "\n")
        return supplied

    Supply.next = and_note  # type: ignore[method-assign]
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
