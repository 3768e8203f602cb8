"""One number a process, and the largest of all: how processes decide together at a step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Largest:
    """The largest of the numbers that all processes hand in, the same everywhere.

    `hand_in` only begins; devices exchange the numbers in turn with other programs, and `result`
    costs nothing once a later result has been waited for.
    """

    def __init__(self, devices=None):
        devices = np.asarray(jax.devices() if devices is None else devices)
        mesh = jax.sharding.Mesh(devices, "devices")
        self._on_cpu = devices[0].platform == "cpu"
        self._split = NamedSharding(mesh, PartitionSpec("devices"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def hand_in(self, number: int) -> None:
        """Give this process's number, >= 0; every process must, in the same order of programs."""
        shape = (self._split.num_devices,)
        mine = np.full((1,), number, np.int32)
        self._pending = self._largest(
            jax.make_array_from_callback(shape, self._split, lambda _: mine)
        )
        if self._on_cpu:
            # Programs that exchange wait there in threads of one pool, and many of them for ever.
            self._pending.block_until_ready()

    def result(self) -> int:
        """The largest number handed in last; 0 before the first time."""
        return 0 if self._pending is None else int(self._pending)
