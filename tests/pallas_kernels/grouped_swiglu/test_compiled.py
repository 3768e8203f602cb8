"""The real compilers take the experts of Text-01 whole, and expand, copy and reshape nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybrid_jax import targets
from pallas_kernels import grouped_swiglu
from pallas_kernels.grouped_swiglu import activation
from tests.pallas_kernels.compiled import compile_for

pytestmark = pytest.mark.aot
# Four of 32 experts a device, and its worst-case buffer, of which an eighth is real rows.
R, E, D, F = 131072, 4, 6144, 9216
KERNELS = {
    "grouped_swiglu_gate_up",
    "grouped_matmul",
    "grouped_swiglu_gate_gradient",
    "grouped_swiglu_dx",
    "grouped_swiglu_ddown",
    "grouped_swiglu_dgate_up",
}


def forward_and_gradients(target: str, rows: int):
    """Out and all gradients of two devices' experts, each with its own, inside shard_map."""
    mesh = jax.sharding.Mesh(np.array(targets.devices(target)[:2]), ("expert",))
    sharding = jax.sharding.NamedSharding(mesh, P("expert"))

    def local(x, gate_up, down, sizes, dout):
        out, pull_back = jax.vjp(
            lambda *arrays: grouped_swiglu(*arrays, sizes[0]), x, gate_up, down
        )
        return out, *pull_back(dout)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((2 * shape[0], *shape[1:]), dtype, sharding=sharding)

    x, sizes = array(rows, D), array(1, E, dtype=jnp.int32)
    split = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(split).lower(x, array(E, D, 2 * F), array(E, F, D), sizes, x).compile()


@pytest.mark.parametrize(
    # Of v5e's memory the worst case would take twice as much as there is.
    ("target", "rows"),
    [
        ("v5p", R),
        pytest.param("tpu7x", R, marks=pytest.mark.nightly),
        pytest.param("v6e", R, marks=pytest.mark.nightly),
        pytest.param("v5e", R // 8, marks=pytest.mark.nightly),
        pytest.param("v4", R, marks=pytest.mark.nightly),
    ],
)
def test_text_01_is_six_kernels_and_two_buffers(target, rows):
    compiled = forward_and_gradients(target, rows)
    text = compiled.as_text()
    kernels = re.findall(r'%([a-z_]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', text)
    assert sorted(kernels) == sorted(KERNELS)
    # Nothing but what says which tile is whose: a row of the buffer would take 10 us.
    cycles = [int(found) for found in re.findall(r'estimated_cycles":"(\d+)', text)]
    assert max(cycles) < 20_000
    # The hidden rows, in whose memory their gradient comes, and the activation.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.01 * rows * 3 * F * 2


@pytest.mark.parametrize("target", ["v5p", "h100"])
def test_the_gradient_of_the_gate_alone_moves_nothing_into_a_third_dim(target):
    hidden = jax.ShapeDtypeStruct((R // 8, 2 * F), jnp.bfloat16)
    dact = jax.ShapeDtypeStruct((R // 8, F), jnp.bfloat16)
    compiled = compile_for(target, activation.gate_gradient, hidden, dact)
    assert f"[{R // 8},2,{F}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.01 * R // 8 * 2 * F * 2
