"""Inside shard_map: which mesh axes an array varies over, made alike for the arguments of an op."""

from collections.abc import Callable
from typing import Any

import jax
from jax._src import config
from jax.extend import core
from jax.interpreters import batching, mlir


def alike(*arrays: Any) -> tuple[Any, ...]:
    """Mark arrays, or trees of them, as varying over the union of their manual mesh axes.

    A loop's carry must vary as its results do. JAX sums the gradient of an array over the axes it
    did not vary over. Outside shard_map this does nothing.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)]
    union = frozenset[str]().union(*axes)
    return jax.tree.map(lambda array: _vary(array, union), arrays)


def of_a_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a library's kernel run inside shard_map: its results vary over what its arguments do.

    Its `pallas_call`s do not say over which axes their results vary, and JAX then refuses them.
    """

    def call(*arrays):
        leaves, tree = jax.tree.flatten(arrays)
        axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))
        with config._check_vma(False):
            if not axes:
                return function(*arrays)
            results = _closed(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*leaves)
        return jax.tree.map(lambda x: _vary(x, axes), results)

    return call


def forget(array: jax.Array) -> jax.Array:
    """The same array, as if it varied over nothing. For use inside `of_a_kernel`; no gradient.

    A kernel with a loop needs it: what it loads varies as its arguments do, and what it computes
    in Mosaic's own operations does not.
    """
    return _forget_p.bind(array)


def _closed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one operation that no transformation opens.

    `jax.checkpoint` around a shard_map would trace parts of it again, and then check them.
    """

    @jax.custom_batching.custom_vmap
    def call(*leaves):
        return jax.jit(function)(*leaves)

    @call.def_vmap
    def many(axis_size, in_batched, *leaves):
        places = [0 if batched else None for batched in in_batched]
        mapped = jax.vmap(function, in_axes=places, axis_size=axis_size)
        results = _closed(mapped)(*leaves)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(axes - jax.typeof(array).manual_axis_type.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array


_forget_p = core.Primitive("forget_mesh_axes")
_forget_p.def_impl(lambda array: array)
_forget_p.def_abstract_eval(
    lambda array: array.update(manual_axis_type=type(array.manual_axis_type)())
)
batching.defvectorized(_forget_p)
mlir.register_lowering(_forget_p, lambda ctx, array: [array])
