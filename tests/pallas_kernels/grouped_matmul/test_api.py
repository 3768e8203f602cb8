"""The public op: the automatic choice, its life inside JAX transformations, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import grouped_matmul
from tests.pallas_kernels.grouped_matmul.contract import Contract, D, E, F, arrays


class Automatic(Contract):
    implementation = None


def test_automatic_choice_is_right_on_this_platform():
    Automatic().check(23, [0, 9, 1, 12])


def test_gradient_through_scan_and_checkpoint():
    x, _, _ = arrays(23)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, E, D, D)) / D, jnp.float32)
    sizes = jnp.asarray([[0, 9, 1, 13], [23, 0, 0, 0], [5, 5, 5, 5]], jnp.int32)

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradients(x, w, implementation):
        @jax.checkpoint
        def layer(x, w_and_sizes):
            out = grouped_matmul(x, *w_and_sizes, implementation=implementation)
            return x + jnp.tanh(out), None

        return jax.grad(lambda x, w: jnp.sum(jax.lax.scan(layer, x, (w, sizes))[0]), (0, 1))(x, w)

    for ours, exact in zip(gradients(x, w, None), gradients(x, w, "reference"), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def test_under_shard_map_the_weight_gradient_is_summed_over_the_row_axis():
    x, w, dout = arrays(23)
    sizes = jnp.asarray([[0, 9, 1, 12]], jnp.int32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, w, op):
        return jnp.sum(op(x, w, sizes) * dout)

    sharded = jax.shard_map(
        lambda x, w, sizes: grouped_matmul(x, w, sizes[0]),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
    )

    def alone(x, w, sizes):
        return grouped_matmul(x, w, sizes[0])

    found = jax.jit(jax.grad(functools.partial(loss, op=sharded), (0, 1)))(x, w)
    expected = jax.jit(jax.grad(functools.partial(loss, op=alone), (0, 1)))(x, w)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def shapes(**changes):
    """Valid arguments but for `changes` (name -> shape and dtype)."""
    spec = {"x": ((6, D), "float32"), "w": ((E, D, F), "float32"), "sizes": ((E,), "int32")}
    return [jnp.zeros(shape, dtype) for shape, dtype in (spec | changes).values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ((6, D, 1), "float32")}, r"needs x of shape \[R D\], got shape \(6, 8, 1\)"),
        ({"w": ((D, F), "float32")}, r"needs w of shape \[E D F\]"),
        ({"sizes": ((E, 1), "int32")}, r"needs group_sizes of shape \[E\]"),
        ({"x": ((6, D + 1), "float32")}, r"contracts dim 1 of x .* \(6, 9\) and w \(4, 8, 12\)"),
        ({"sizes": ((E + 1,), "int32")}, "got 5 sizes"),
        ({"sizes": ((E - 1,), "int32")}, "got 3 sizes .* give group_offset"),
        ({"sizes": ((E,), "float32")}, "needs integer group_sizes, got float32"),
        ({"w": ((E, D, F), "bfloat16")}, "of one dtype .* x float32 and w bfloat16"),
        ({"x": ((6, D), "int32"), "w": ((E, D, F), "int32")}, "float32, bfloat16"),
    ],
)
def test_errors_say_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*shapes(**changes))


def test_group_offset_is_an_integer_scalar():
    with pytest.raises(ValueError, match=r"needs group_offset of shape \[\]"):
        grouped_matmul(*shapes(), group_offset=jnp.zeros((1,), jnp.int32))
    with pytest.raises(ValueError, match="needs integer group_offset"):
        grouped_matmul(*shapes(), group_offset=jnp.float32(0))


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="no implementation 'pallas'"):
        grouped_matmul(*shapes(), implementation="pallas")


@pytest.mark.parametrize(("platform", "native"), [("tpu", True), ("cuda", False), ("cpu", False)])
def test_the_platform_compiled_for_decides(platform, native):
    traced = jax.jit(jax.grad(lambda x, w, s: jnp.sum(grouped_matmul(x, w, s)), (0, 1))).trace(
        *shapes()
    )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == native
