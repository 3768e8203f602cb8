"""The interface of Mosaic GPU in the versions of JAX we run on."""

import inspect
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.errors import Unsupported

# jax 0.10 wants an index apart, which jax 0.11 deprecates and jax 0.12 does not take.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_WANTS_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty

# Of what is copied to shared memory for matrix products; also the step of lengths it can have.
TILE_ROWS = 8


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """Read a reference into registers of the given layout."""
    index = ((),) if _LOAD_WANTS_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def accumulate(products: Any, start: jax.Array, *, in_place: bool) -> jax.Array:
    """`start` and what `products(accumulator)` adds to it.

    In place it takes half of the registers, and no interpreter can do it.
    """
    if in_place:
        return pl.run_state(products)(plgpu.ACC.init(start))

    def from_zero(accumulator):
        products(accumulator)
        return accumulator[...]

    rows, columns = start.shape
    return start + pl.run_scoped(from_zero, plgpu.ACC((rows, columns), start.dtype))


def store(ref: Any, value: jax.Array) -> None:
    """Write registers to a reference in global memory, in whatever order they hold its elements."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def swizzled_tiles(columns: int) -> tuple[Any, ...]:
    """The layout in shared memory that matrix products read: tiles of 8 rows of 128 bytes."""
    # The types of jax 0.12 call both classes abstract for a method whose body is only a docstring.
    tiling = plgpu.TilingTransform((TILE_ROWS, columns))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(128)  # type: ignore[abstract]


def interpret_params(interpret: Any) -> Any:
    """What a kernel takes for our `interpret`: None compiles, True has the default parameters."""
    if interpret is not True:
        return interpret or None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise Unsupported(
            f"jax {jax.__version__} has no public interpret mode of Mosaic GPU kernels; 0.12 has"
        )
    return plgpu.InterpretGPUParams()
