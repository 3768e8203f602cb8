"""What each of two processes with four devices does in `test_saving.py`: save a model together."""

import json
import os
import pathlib
import signal
import sys

import jax

import hybrid_jax
from hybrid_jax.checkpoint import draft
from sharding import processes
from tests.checkpoint import killed
from tests.checkpoint.models import LARGE, SHARD_BYTES, model_of, placed


def main(place: str, source: str, *ends: str) -> None:
    processes.start()
    out = pathlib.Path(place)
    model = placed(model_of(**LARGE), jax.devices())

    def save(name: str, *arguments) -> None:
        options = {"sidecars": source, "shard_bytes": SHARD_BYTES}
        hybrid_jax.save(model, out / name, *arguments, **options)

    if ends:
        _end_early(save)
    for format in ("hf-original", "hf", "orbax"):
        before = killed.io()
        save(format, format)
        io = {name: count - before[name] for name, count in killed.io().items()}
        print(json.dumps({"format": format, "process": jax.process_index()} | io), flush=True)
    save("bfloat16", "hf-original", "bfloat16")
    # One that each has for itself.
    hybrid_jax.save(model_of(), out / "fp8", dtype="fp8")
    for name, dtype in (("hf", None), ("split", "fp8")):
        try:
            save(name, "hf-original", dtype)
        except ValueError as error:
            print(json.dumps({"error": str(error)}), flush=True)


def _end_early(save) -> None:
    """The disk is full for the second process, and later it is killed as it records a unit."""
    record = draft.Draft.record

    def full(self, number, written):
        if number == 3:
            raise OSError(28, "No space left on device")
        record(self, number, written)

    draft.Draft.record = full
    try:
        save("orbax", "orbax")
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)

    def kill(self, number, written):
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, number, written)

    draft.Draft.record = kill
    save("hf", "hf")


if __name__ == "__main__":
    main(*sys.argv[1:])
