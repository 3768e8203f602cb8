"""Programs for devices that need not be there, and what is in them."""

import re

import jax
import numpy as np

from hybrid_jax import targets

TPUS = ("v5e", "v5p", "v6e", "tpu7x")


def compile_for(target: str, function, *arrays):
    """The program of one device of the target; arrays are abstract, None where one is missing."""
    mesh = jax.sharding.Mesh(np.array(targets.devices(target)[:1]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = [
        None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for array in arrays
    ]
    return jax.jit(function).lower(*placed).compile()


def custom_calls(compiled) -> list[str]:
    """The kernels in a program, one entry a call."""
    return re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
