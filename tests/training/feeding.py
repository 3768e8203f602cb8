"""What each of two processes with two devices does in `test_processes.py`: it places a batch."""

import operator

import jax
import numpy as np

from hybrid_jax.model.parallel import placement
from hybrid_jax.training.feed import Feed
from sharding import processes
from tests.training import small

MESHES = (("fsdp=4", "fsdp"), ("sequence=4", "long_context"), ("tensor=4", "fsdp_tensor"))


def main() -> None:
    processes.start()
    whole = small.random_batch(8, 32)
    for mesh, rules in MESHES:
        feed = Feed(placement.make(mesh, rules), 8, 32)
        placed = feed.place(jax.tree.map(operator.itemgetter(list(feed.rows)), whole))
        print("".join(map(str, feed.rows)), flush=True)
        for array, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
            assert array.shape == wanted.shape
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, wanted[shard.index])
    assert len(jax.local_devices()) == 2


if __name__ == "__main__":
    main()
