"""What each of two processes with four devices does in `test_saving.py`: save a model together."""

import json
import pathlib
import sys

import jax

import hybrid_jax
from sharding import processes
from tests.checkpoint import killed
from tests.checkpoint.test_saving import model_of, placed


def main(place: str, source: str) -> None:
    processes.start()
    out = pathlib.Path(place)
    model = placed(model_of(), jax.devices())
    for format in ("hf-original", "hf", "orbax"):
        before = killed.io()
        hybrid_jax.save(model, out / format, format, sidecars=source, shard_bytes=2_000_000)
        io = {name: count - before[name] for name, count in killed.io().items()}
        print(json.dumps({"format": format, "process": jax.process_index()} | io), flush=True)
    try:
        hybrid_jax.save(model, out / "hf")
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
