"""What travels between devices, and that causal work is the same on each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hybrid_jax.model.parallel import balance
from hybrid_jax.model.parallel.ring import Ring, blocks_of_step
from tests.model.parallel import collectives, rows

INPUTS = rows.make_inputs(documents=[(1, 20), (2, 30), (0, 14)])


def compiled(size: int, method: str, *, gradient: bool):
    """The program of the forward, or of the forward and the gradients."""
    mesh = rows.make_mesh(sequence=size)
    placed = rows.place(mesh, INPUTS)
    if gradient:
        return rows.program(mesh, method=method).lower(*placed).compile()
    return jax.jit(rows.on_mesh(mesh, method=method)).lower(*placed[:4]).compile()


@pytest.mark.parametrize(
    "method, kinds",
    [
        ("ring", {"collective-permute"}),
        ("all_gather", {"all-gather", "reduce-scatter"}),
        ("heads", {"all-to-all"}),
    ],
)
def test_each_method_has_its_own_collectives_and_no_others(method, kinds):
    found = collectives.of(compiled(4, method, gradient=True))
    assert {x.kind for x in found} == kinds
    if method != "ring":
        # k and v and back; q, k, v, out and back, each with a part for each of four devices.
        assert len(found) == {"all_gather": 4, "heads": 8 * 4}[method]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_ring_sends_what_is_promised(size):
    q, k, v, out = (
        x.size * x.dtype.itemsize // size for x in (INPUTS.q, INPUTS.k, INPUTS.v, INPUTS.d_out)
    )
    forward = q + k + v + out + (size - 1) * (k + v)
    # The first step of the second ring was made in the first: XLA finds that nothing differs.
    backward = q + k + v + out + (size - 2) * (k + v) + size * (k + v)
    for gradient, expected in ((False, forward), (True, forward + backward)):
        found = collectives.of(compiled(size, "ring", gradient=gradient))
        assert sum(x.num_bytes * x.trips for x in found) == expected


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_device_calculates_as_many_blocks_and_all_visible_ones_once(size):
    """Chunks are known by their segment ids."""
    mesh = rows.make_mesh(sequence=size)
    chunk_ids = jnp.arange(2 * size, dtype=jnp.int32)[None]
    ring = Ring("sequence", None)

    def local(chunk_ids):
        steps = [blocks_of_step(ring, chunk_ids, step) for step in range(1, size)]
        return jnp.stack([jnp.stack([x.q_segment_ZC, x.kv_segment_ZC]) for x in steps])[None]

    spec = PartitionSpec("sequence")
    found = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec)(chunk_ids)
    # [device, step, query or key, block, 1]
    found = np.asarray(found)[..., 0]
    assert found.shape == (size, size - 1, 2, 2)
    blocks = [tuple(block) for block in found.swapaxes(2, 3).reshape(-1, 2).tolist()]
    for device in range(size):
        # Its own: two on the diagonal, half visible, and the later queries on the earlier keys.
        low, high = device, 2 * size - 1 - device
        blocks += [(low, low), (high, low), (high, high)]
    visible = [(query, key) for query in range(2 * size) for key in range(query + 1)]
    assert sorted(blocks) == visible


@pytest.mark.parametrize("size", [2, 3, 8])
def test_dealt_tokens_stand_where_the_blocks_expect_them_and_come_back(size):
    mesh = rows.make_mesh(sequence=size)
    tokens = jnp.arange(4 * size, dtype=jnp.int32)[None]
    spec = PartitionSpec(None, "sequence")
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    dealt = on_mesh(lambda x: balance.deal(x, "sequence"))(tokens)
    chunks = np.asarray(tokens).reshape(2 * size, 2)
    places = [place for low in range(size) for place in (low, 2 * size - 1 - low)]
    np.testing.assert_array_equal(np.asarray(dealt).reshape(2 * size, 2), chunks[places])
    back = on_mesh(lambda x: balance.collect(x, "sequence"))(dealt)
    np.testing.assert_array_equal(back, tokens)
