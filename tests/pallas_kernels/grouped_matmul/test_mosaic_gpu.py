"""JAX's grouped matmul for Hopper behind our padding: numbers in its interpreter, and its limits.

The interpreter is public since jax 0.12, and slow. That the kernels compile is in test_compiled.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.errors import Unsupported
from pallas_kernels.grouped_matmul import api
from tests.pallas_kernels.grouped_matmul import oracle

R, E, D, F = 256, 4, 128, 128


def check(sizes, rows=R, width=D, columns=F):
    """Outputs and both gradients against float64; rows of no group hold NaN."""
    rng = np.random.default_rng(0)
    shapes = ((rows, width), (len(sizes), width, columns), (rows, columns))
    x, w, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    past_R1 = (np.arange(rows) >= sum(sizes))[:, None]
    out, pullback = jax.vjp(
        lambda x, w: grouped_matmul(x, w, jnp.int32(sizes), implementation="mosaic_gpu"),
        *(jnp.where(past_R1, jnp.nan, x), w),
    )
    dx, dw = pullback(jnp.where(past_R1, jnp.nan, dout))
    x, w, dout = (np.asarray(a, np.float64) for a in (x, w, dout))
    expected = (oracle.grouped_matmul(x, w, sizes), *oracle.gradients(x, w, sizes, dout))
    for name, ours, exact in zip(("out", "dx", "dw"), (out, dx, dw), expected, strict=True):
        error = np.abs(np.asarray(ours, np.float64) - exact).max()
        # Half a unit in the last of 8 bits.
        assert error <= 2**-8 * np.abs(exact).max(), f"{name}: {error}"


def test_output_and_gradients_in_the_interpreter():
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("jax before 0.12 has no public interpreter of Mosaic GPU")
    with plgpu.force_gpu_interpret_mode():
        check([100, 0, 57, 40])


@pytest.mark.gpu_device
@pytest.mark.parametrize("sizes", [[500, 0, 17, 1200], [0, 2048, 0, 0], [512] * 4, [0] * 4])
def test_output_and_gradients_on_a_gpu(sizes):
    check(sizes, rows=2048, width=256, columns=384)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": jnp.float32}, "needs bfloat16, got float32"),
        ({"D": 192}, "widths of a multiple of 128, got 192, 128"),
        ({"R": 100}, "100 rows for 4 groups leave tiles of 128 rows empty"),
    ],
)
def test_what_it_cannot_take_is_refused_with_the_reason(change, reason):
    call = {"R": R, "D": D, "dtype": jnp.bfloat16} | change
    x = jnp.zeros((call["R"], call["D"]), call["dtype"])
    w, sizes = jnp.zeros((E, call["D"], F), call["dtype"]), jnp.zeros(E, jnp.int32)
    with pytest.raises(Unsupported, match=f"for hopper: .*{reason}"):
        grouped_matmul(x, w, sizes, implementation="mosaic_gpu")
    choices = api.choices(x, w, sizes)
    assert choices["hopper"].name == "xla"
    assert reason in choices["hopper"].refusals["mosaic_gpu"]


def test_it_is_chosen_for_hopper_alone():
    x, w = jnp.zeros((R, D), jnp.bfloat16), jnp.zeros((E, D, F), jnp.bfloat16)
    choices = api.choices(x, w, jnp.zeros(E, jnp.int32))
    names = {where: choice.name for where, choice in choices.items()}
    assert names == {"tpu": "pallas_tpu", "hopper": "mosaic_gpu", "blackwell": "xla",
                     "cuda": "xla", "cpu": "xla"}  # fmt: skip
