"""Inside shard_map: which mesh axes an array varies over, made alike for the arguments of an op."""

import jax


def alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Mark all arrays as varying over the union of their manual mesh axes; None stays None.

    A loop's carry must vary as its results do. JAX sums the gradient of an array over the axes it
    did not vary over. Outside shard_map this does nothing.
    """
    axes = [
        frozenset() if array is None else jax.typeof(array).manual_axis_type.varying
        for array in arrays
    ]
    union = frozenset().union(*axes)
    return tuple(
        jax.lax.pcast(array, tuple(union - own), to="varying")
        if array is not None and union - own
        else array
        for array, own in zip(arrays, axes, strict=True)
    )
