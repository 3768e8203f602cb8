"""What each of two processes with two devices does in `test_processes.py`: share checkpoints."""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.checkpoint import manifest
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.state import TrainState
from sharding import processes


def state(step: int, spec: PartitionSpec) -> TrainState:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
    values = np.random.default_rng(step).standard_normal((64, 512), np.float32)

    def put(array, spec):
        place = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    split, whole = put(values, spec), put(values[0], PartitionSpec())
    moments = {"a.scale": put(-values, spec), "b.scale": put(-values[0], PartitionSpec())}
    count = put(np.array(step, np.int32), PartitionSpec())
    return TrainState(count, {"a.scale": split, "b.scale": whole}, moments)


def abstract(spec: PartitionSpec) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, spec)
    )


def main(place: str) -> None:
    processes.start()
    directory = pathlib.Path(place)
    halves, quarters = PartitionSpec("data"), PartitionSpec(("data", "fsdp"))
    notes: list[str] = []
    with CheckpointStore(directory, keep=2, note=notes.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step, halves), {"batches": step}, "data")
            # Both have done their part, the first one the manifest.
            processes.all_pass(checkpoints.wait)
        print(sorted(path.name for path in directory.iterdir()), flush=True)
        print(checkpoints.restore(abstract(halves)).position, flush=True)

        verify, calls = manifest.verify, []

        def counted(*arguments, **options):
            calls.append(options["number"])
            return verify(*arguments, **options)

        manifest.verify = counted
        # Parts of parts: the files are read once more instead.
        restored = checkpoints.restore(abstract(quarters)).state
        assert calls == [jax.process_index()] * 2
        manifest.verify = verify
        for found, wanted in zip(
            jax.tree.leaves(restored), jax.tree.leaves(state(2, quarters)), strict=True
        ):
            for mine, right in zip(found.addressable_shards, wanted.addressable_shards):
                np.testing.assert_array_equal(mine.data, right.data)

        # Only one of the two reads this file.
        if processes.is_first():
            path = max((directory / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
            contents = bytearray(path.read_bytes())
            contents[1000] ^= 1
            path.write_bytes(contents)
        processes.all_pass(lambda: None)
        print(checkpoints.restore(abstract(halves)).position, flush=True)
        assert len(notes) == 1 and "has other contents" in notes[0], notes


if __name__ == "__main__":
    main(sys.argv[1])
