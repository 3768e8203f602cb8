"""Rows reach the experts' devices in order and return, and so do their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from sharding import exchange, tpu_rows
from tests import aot

D, E, ROWS, ARRIVE = 3, 8, 24, 60
SPLIT = PartitionSpec(("data", "expert"))


def mesh_of(degree, devices=None):
    """Two or more groups of devices side by side, so that an exchange must stay in its own."""
    shape = (len(devices or jax.devices()) // degree, degree)
    return jax.make_mesh(shape, ("data", "expert"), (AxisType.Auto,) * 2, devices=devices)


def counts_of(degree):
    """Uneven; expert 2 gets nothing and the last device has nothing to send."""
    counts = np.random.default_rng(degree).integers(0, 4, (degree, E)).astype(np.int32)
    counts[:, 2], counts[-1] = 0, 0
    return counts


def expected_arrivals(x_GPRD, counts, kept):
    """What stands at each device after the exchange, by the definition."""
    out = np.zeros((*x_GPRD.shape[:2], ARRIVE, D), x_GPRD.dtype)
    P = len(counts)
    for group, receiver in np.ndindex(x_GPRD.shape[:2]):
        rows = []
        for expert in range(receiver * E // P, (receiver + 1) * E // P):
            for sender in range(P):
                first = counts[sender, :expert].sum()
                rows.extend(x_GPRD[group, sender, first : first + kept[sender, expert]])
        if rows:
            out[group, receiver, : len(rows)] = rows
    return out


def there_and_back(x, counts, kept, *, axis="expert", function=exchange.exchange_rows):
    routes = exchange.expert_routes(counts, kept)
    arrived = function(x, routes, ARRIVE, axis)
    return arrived, function(arrived, routes.back(), x.shape[0], axis)


def on_devices(degree, function, devices=None):
    return jax.shard_map(
        function,
        mesh=mesh_of(degree, devices),
        in_specs=(SPLIT, PartitionSpec(), PartitionSpec()),
        out_specs=SPLIT,
    )


def inputs(degree):
    counts = counts_of(degree)
    kept = np.minimum(counts, 2)
    x = np.random.default_rng(degree).normal(size=(8 // degree, degree, ROWS, D))
    return x.astype(np.float32), counts, kept


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_rows_stand_by_expert_then_sender_and_return_to_their_places(degree):
    x, counts, kept = inputs(degree)
    arrived, returned = jax.jit(on_devices(degree, there_and_back))(x.reshape(-1, D), counts, kept)
    np.testing.assert_array_equal(
        arrived.reshape(*x.shape[:2], ARRIVE, D), expected_arrivals(x, counts, kept)
    )
    at_home = np.zeros_like(x)
    for sender, expert in np.ndindex(counts.shape):
        first = counts[sender, :expert].sum()
        rows = slice(first, first + kept[sender, expert])
        at_home[:, sender, rows] = x[:, sender, rows]
    np.testing.assert_array_equal(returned.reshape(x.shape), at_home)


@pytest.mark.parametrize("degree", [2, 8])
def test_the_gradient_is_the_exchange_back(degree):
    x, counts, kept = inputs(degree)
    flat = x.reshape(-1, D)
    out, pull = jax.vjp(
        lambda x: jax.jit(on_devices(degree, there_and_back))(x, counts, kept)[0], flat
    )
    weight = np.random.default_rng(7).normal(size=out.shape).astype(np.float32)
    # The rows of x numbered from 1 and sent: where each stands, or 0.
    names = np.arange(1, x[..., 0].size + 1, dtype=np.float32)
    places = expected_arrivals(
        np.broadcast_to(names.reshape(*x.shape[:3], 1), x.shape), counts, kept
    )[..., 0].reshape(-1)
    expected = np.zeros((len(names) + 1, D), np.float32)
    expected[places.astype(int)] = weight
    np.testing.assert_array_equal(pull(weight)[0], expected[1:])


def documented_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What JAX's documentation says, slice by slice, for a handful of rows."""
    me, slices = lax.axis_index(axis_name), len(send_sizes) // lax.axis_size(axis_name)
    gather = functools.partial(lax.all_gather, axis_name=axis_name)
    sent, firsts, sizes, places = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    row = jnp.arange(output.shape[0])
    row = row.reshape(-1, *[1] * (operand.ndim - 1))
    for i in range(len(recv_sizes)):
        mine = me * slices + i % slices
        first, size, place = (array[i // slices, mine] for array in (firsts, sizes, places))
        here = (row >= place) & (row < place + recv_sizes[i]) & (recv_sizes[i] == size)
        at = jnp.clip(row - place + first, 0, operand.shape[0] - 1).reshape(-1)
        output = jnp.where(here, sent[i // slices][at], output)
    return output


def garbage(shape, dtype):
    """What may lie in memory that nothing has been written to."""
    wrong = jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
    return jnp.full(shape, wrong, dtype)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize(
    "name, dtype", [("_ragged_all_to_all", np.float32), ("_ragged_words_to_all", jnp.bfloat16)]
)
def test_the_native_collective_is_asked_for_the_same_rows(degree, name, dtype, monkeypatch):
    x, counts, kept = inputs(degree)
    x = x.reshape(-1, D).astype(dtype)
    twin = jax.jit(on_devices(degree, there_and_back))(x, counts, kept)
    monkeypatch.setattr(lax, "ragged_all_to_all", documented_ragged_all_to_all)
    native = functools.partial(there_and_back, function=getattr(exchange, name))
    ours = jax.jit(
        jax.shard_map(
            native,
            mesh=mesh_of(degree),
            in_specs=(SPLIT, PartitionSpec(), PartitionSpec()),
            out_specs=SPLIT,
            check_vma=False,
        )
    )(x, counts, kept)
    for left, right in zip(ours, twin, strict=True):
        np.testing.assert_array_equal(left, right)


# One tile of words, and one and a half.
@pytest.mark.parametrize("width", [2048, 3072])
def test_rows_in_tiles_of_words_are_the_same_rows(width, monkeypatch):
    _, counts, kept = inputs(4)
    x = np.random.default_rng(1).normal(size=(8 * ROWS, width)).astype(jnp.bfloat16)
    twin = jax.jit(on_devices(4, there_and_back))(x, counts, kept)
    monkeypatch.setattr(lax, "ragged_all_to_all", documented_ragged_all_to_all)
    monkeypatch.setattr(tpu_rows, "unfilled", lambda shape, dtype, *_, **__: garbage(shape, dtype))
    function = functools.partial(exchange._ragged_words_to_all, interpret=True)
    native = functools.partial(there_and_back, function=function)
    specs = (SPLIT, PartitionSpec(), PartitionSpec())
    placed = jax.shard_map(
        native, mesh=mesh_of(4), in_specs=specs, out_specs=SPLIT, check_vma=False
    )
    for left, right in zip(jax.jit(placed)(x, counts, kept), twin, strict=True):
        np.testing.assert_array_equal(left, right)


def test_an_axis_of_two_mesh_axes_numbers_devices_the_major_one_first():
    x, counts, kept = inputs(8)
    exchanged = jax.shard_map(
        functools.partial(there_and_back, axis=("data", "expert")),
        mesh=mesh_of(4),
        in_specs=(SPLIT, PartitionSpec(), PartitionSpec()),
        out_specs=SPLIT,
    )
    arrived, _ = jax.jit(exchanged)(x.reshape(-1, D), counts, kept)
    expected = expected_arrivals(x, counts, kept)
    np.testing.assert_array_equal(arrived.reshape(expected.shape), expected)


def test_what_does_not_divide_or_fit_is_said():
    with pytest.raises(ValueError, match="8 experts and 3 devices"):
        exchange.expert_routes(jnp.zeros((3, 8), jnp.int32))
    with pytest.raises(ValueError, match=r"routes \[4, 4, slices\].*got \(2, 2, 4\)"):
        x, _, _ = inputs(4)
        jax.eval_shape(on_devices(4, there_and_back), x.reshape(-1, D), *inputs(2)[1:])


@pytest.mark.aot
@pytest.mark.parametrize(("told", "width"), [(False, 512), (True, 2048)])
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100:8", "b200:8"])
def test_programs_for_chips_hold_the_native_collective(target, told, width):
    devices = aot.devices(target)
    platform = devices[0].platform if told else None

    def both(x, counts, dout):
        def there(x):
            routes = exchange.expert_routes(counts)
            return exchange.exchange_rows(x, routes, 2048, "expert", platform=platform)

        out, pull = jax.vjp(there, x)
        return out, pull(dout)

    mesh = mesh_of(len(devices), devices)
    whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, SPLIT)
    x, dout = (
        jax.ShapeDtypeStruct((len(devices) * rows, width), jnp.bfloat16, sharding=split)
        for rows in (1024, 2048)
    )
    counts = jax.ShapeDtypeStruct((len(devices), 4 * len(devices)), jnp.int32, sharding=whole)
    specs = (SPLIT, PartitionSpec(), SPLIT)
    function = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=SPLIT)
    text = jax.jit(function).lower(x, counts, dout).compile().as_text()
    # There and back.
    assert text.count(" ragged-all-to-all") >= 2
    assert "all-gather" not in text
