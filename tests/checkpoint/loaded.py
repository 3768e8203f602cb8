"""What each process that `test_loading.py` starts does: `python loaded.py DIRECTORY ORBAX`."""

import sys

import jax
import numpy as np

import hybrid_jax
from hybrid_jax.checkpoint import leaves, opened
from hybrid_jax.checkpoint.formats.hf_directory import HfDirectory
from hybrid_jax.checkpoint.formats.orbax import OrbaxDirectory
from hybrid_jax.model.parallel import placement as placements
from sharding import processes

# (mesh, rules, whether neighbours on the mesh are in different processes, part of the bytes).
CASES = (
    ("tensor=8", "fsdp_tensor", False, 0.5),
    ("expert=8", "expert", False, 0.5),
    ("expert=8", "expert", True, 0.5),
    # Copies along data are whole in each process.
    ("data=2,expert=4", "expert", False, 1.0),
)


def main(directory: str, orbax: str) -> int:
    assert processes.start()
    sources = []

    def counted(kind):
        def opened_one(folder):
            sources.append(kind(folder))
            return sources[-1]

        return opened_one

    opened.HfDirectory = counted(HfDirectory)
    opened.orbax.OrbaxDirectory = counted(OrbaxDirectory)
    # Of this process alone.
    whole = leaves.arrays(hybrid_jax.load(directory, dtype="bfloat16"))
    total = sources[-1].bytes_read
    if processes.is_first():
        # Orbax would have it wait for the others.
        hybrid_jax.load(orbax, dtype="bfloat16")

    def check(path, placement) -> None:
        model = hybrid_jax.load(path, dtype="bfloat16", placement=placement)
        for name, array in leaves.arrays(model).items():
            assert not array.is_fully_addressable
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, np.asarray(whole[name])[shard.index]), name

    for mesh, rules, is_interleaved, _ in CASES:
        devices = jax.devices()
        if is_interleaved:
            devices = [device for pair in zip(devices[:4], devices[4:]) for device in pair]
        placement = placements.make(mesh, rules, devices)
        check(directory, placement)
        print(mesh, sources[-1].bytes_read, total)
    # Experts are tensors of their own in Orbax: half of them, and attention whole.
    placement = placements.make("expert=8", "expert")
    check(orbax, placement)
    print("orbax", sources[-1].bytes_read, total)
    try:
        # What one process cannot read, no other goes on without.
        mine = directory if processes.is_first() else f"{directory}/none"
        hybrid_jax.load(mine, placement=placement)
    except ValueError as error:
        print("refused", error)
    return 0


if __name__ == "__main__":
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    sys.exit(main(*sys.argv[1:]))
