"""What a program is compiled for: known when it is lowered, whatever devices this machine has."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import batching, mlir

Target = Literal["tpu", "hopper", "blackwell", "cuda", "cpu"]
"""hopper and blackwell are NVIDIA's compute capabilities 9.x and 10.x; cuda is every other, also
one that nobody names (`jax.export`); cpu is every other platform."""

TARGETS: tuple[Target, ...] = get_args(Target)
_CUDA: tuple[Target, ...] = ("cuda", "hopper", "blackwell")
_BY_MAJOR: dict[int, Target] = {9: "hopper", 10: "blackwell"}


def select(branches: Mapping[Target, Callable[..., Any]], *arrays: Any) -> Any:
    """Call the branch of the target compiled for; the choice is made when the program is lowered.

    Every branch is traced, whatever the target, so none may raise; all return alike. Take gradients
    of a function that holds this by a custom rule: JAX's own would keep residuals of all branches.
    """
    if len({branches[target] for target in TARGETS}) == 1:
        return branches["cpu"](*arrays)
    generations = list(dict.fromkeys(branches[target] for target in _CUDA))
    places = tuple(generations.index(branches[target]) for target in _CUDA)

    def cuda(*arrays):
        # XLA folds the constant index before it compiles a kernel of the branches not taken.
        return lax.switch(_place_p.bind(places=places), generations, *arrays)

    return lax.platform_dependent(
        *arrays,
        tpu=branches["tpu"],
        cuda=cuda if len(generations) > 1 else generations[0],
        default=branches["cpu"],
    )


def announce(notes: tuple[tuple[Target, str], ...], array: jax.Array) -> jax.Array:
    """The array as it is. A program lowered for a target of the notes logs that note, once."""
    return _note_p.bind(array, notes=notes) if notes else array


def _target(ctx) -> Target:
    """The target of the program that is being lowered, by the compiler that will get it."""
    if ctx.module_context.platforms[0] != "cuda":
        return "tpu" if ctx.module_context.platforms[0] == "tpu" else "cpu"
    backend = ctx.module_context.backend
    device = backend.devices()[0] if backend is not None else None
    major = int(getattr(device, "compute_capability", "0").partition(".")[0])
    return _BY_MAJOR.get(major, "cuda")


def _lower_place(ctx, *, places: tuple[int, ...]):
    return [mlir.ir_constant(np.int32(places[_CUDA.index(_target(ctx))]))]


def _lower_note(ctx, array, *, notes: tuple[tuple[Target, str], ...]):
    note = dict(notes).get(_target(ctx))
    if note is not None and note not in _announced:
        _announced.add(note)
        logging.getLogger(__name__).warning(note)
    return [array]


_announced: set[str] = set()
_place_p = core.Primitive("place_of_cuda_generation")
_place_p.def_abstract_eval(lambda *, places: jax.core.ShapedArray((), jnp.int32))
mlir.register_lowering(_place_p, _lower_place, platform="cuda")

_note_p = core.Primitive("note_for_target")
_note_p.def_impl(lambda array, *, notes: array)
_note_p.def_abstract_eval(lambda array, *, notes: array)
batching.defvectorized(_note_p)
mlir.register_lowering(_note_p, _lower_note)
