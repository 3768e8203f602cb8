"""Compile a function for one device of a chip that is not there."""

from collections.abc import Callable
from typing import Any

from hybrid_jax.targets.topology import devices


def compile_for(target: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`jax.stages.Compiled` for one device of a target such as "v5p" or "h100".

    Args:
      function: jitted or not.
      arguments: trees of jax.ShapeDtypeStruct (or arrays), each whole on the device.

    Raises what `devices` raises, and what the compiler raises.
    """
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(devices(target)[:1]), ("device",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), arguments
    )
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*arguments).compile()
