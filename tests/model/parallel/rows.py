"""Attention on a mesh of simulated devices beside the same on one: inputs, programs, comparison."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.model.parallel.softmax import split_softmax_attention
from pallas_kernels import softmax_attention
from tests.pallas_kernels.softmax_attention.oracle import Results

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS = PartitionSpec(("data", "fsdp"), "sequence", "tensor")
IDS = PartitionSpec(("data", "fsdp"))


class Inputs(NamedTuple):
    """Whole arrays of one call, and the cotangent of its result."""

    q: Any
    k: Any
    v: Any
    ids: Any
    d_out: Any


def make_inputs(B=2, T=64, H=8, G=2, K=8, V=16, documents=None, dtype=jnp.float32) -> Inputs:
    """Normal numbers off centre; `documents` are runs of an id, (id, length), in every row."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape) + 0.5, dtype)

    ids = None
    if documents is not None:
        row = np.concatenate([np.full(length, id, np.int32) for id, length in documents])
        # Rows differ, so that none may pass for another.
        ids = jnp.asarray(np.stack([np.roll(row, 3 * b) for b in range(B)]))
    return Inputs(
        normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, V), ids, normal(B, T, H, V)
    )


def make_mesh(devices=None, **sizes: int) -> Mesh:
    """Axes that are not named have size 1."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), AXES)


def _results(attend, q, k, v, ids, d_out) -> Results:
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
    return Results(out, *pullback(d_out))


def on_mesh(mesh: Mesh, kv_spec=ROWS, **options):
    """The op on whole arrays, split as the mesh says: a function of q, k, v and ids."""

    def local(q, k, v, ids):
        return split_softmax_attention(q, k, v, segment_ids=ids, **options)

    def attend(q, k, v, ids):
        specs = (ROWS, kv_spec, kv_spec, None if ids is None else IDS)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=ROWS)(q, k, v, ids)

    return attend


def program(mesh: Mesh, kv_spec=ROWS, **options):
    """All results on the mesh, jitted."""
    return jax.jit(functools.partial(_results, on_mesh(mesh, kv_spec, **options)))


def place(mesh: Mesh, inputs: Inputs, kv_spec=ROWS) -> Inputs:
    """The arrays where the program wants them, real or abstract."""
    specs = Inputs(ROWS, kv_spec, kv_spec, IDS, ROWS)

    def one(x, spec):
        if x is None:
            return None
        return jax.device_put(x, NamedSharding(mesh, spec))

    return Inputs(*map(one, inputs, specs))


def run(mesh: Mesh, inputs: Inputs, kv_spec=ROWS, **options) -> Results:
    """All results on the mesh."""
    return program(mesh, kv_spec, **options)(*place(mesh, inputs, kv_spec))


@jax.jit
def on_one_device(q, k, v, ids, d_out) -> Results:
    """All results by the op itself."""

    def attend(q, k, v, ids):
        return softmax_attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids)

    return _results(attend, q, k, v, ids, d_out)


def assert_close(found: Results, expected: Results, tolerance: float):
    """Each array against the largest of its expected numbers."""
    for name, ours, theirs in zip(Results._fields, found, expected, strict=True):
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert ours.shape == theirs.shape, name
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, f"{name}: {error}"
