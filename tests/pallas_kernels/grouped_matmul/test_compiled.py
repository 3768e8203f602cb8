"""The real compilers take the grouped matmuls, and neither expand nor copy what they should not."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import grouped_matmul
from tests.pallas_kernels.compiled import TPUS, compile_for, custom_calls

pytestmark = pytest.mark.aot
# An eighth of Text-01's experts, and fewer of them: what is copied or expanded shows all the same.
R, E, D, F = 4096, 8, 768, 2304


def forward_and_gradients(target, *, layers=1, dtype=jnp.bfloat16, width=D):
    """The program of one call and its pullback; of one layer out of several if more than one."""

    def both(x, w, sizes, offset, d_out):
        out, pullback = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, group_offset=offset), *(x, w)
        )
        return out, pullback(d_out)

    x, d_out = (jax.ShapeDtypeStruct((R, columns), dtype) for columns in (width, F))
    w = jax.ShapeDtypeStruct((layers * E, width, F), dtype)
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    offset = jax.ShapeDtypeStruct((), jnp.int32) if layers > 1 else None
    return compile_for(target, both, x, w, sizes, offset, d_out)


def temporaries(compiled) -> float:
    """As a multiple of the matrices of one layer; all rows times all matrices would be 16."""
    return compiled.memory_analysis().temp_size_in_bytes / (E * D * F * 2)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("target", TPUS)
def test_tpu_programs_hold_three_kernels(target, layers):
    compiled = forward_and_gradients(target, layers=layers)
    assert custom_calls(compiled).count("tpu_custom_call") == 3
    # Of several layers, the gradient of one before it is put among the zeros of the others.
    assert temporaries(compiled) < (0.1 if layers == 1 else 1.1)


@pytest.mark.parametrize("target", TPUS)
def test_what_the_tpu_kernels_refuse_is_ragged_dot(target):
    compiled = forward_and_gradients(target, width=D - 64)
    # The rows times the matrices natively; their gradient may be a kernel of XLA or dense.
    assert custom_calls(compiled).count("tpu_custom_call") >= 2
    assert temporaries(compiled) < 2.1


@pytest.mark.parametrize("layers", [1, 3])
def test_hopper_programs_hold_mosaic_gpu_kernels(layers):
    compiled = forward_and_gradients("h100", layers=layers)
    assert sum("mosaic_gpu" in call for call in custom_calls(compiled)) == 3
    # The rows again, without those of no group, and of several layers one layer's matrices.
    assert temporaries(compiled) < (1 if layers == 1 else 2)


@pytest.mark.parametrize(
    "target, dtype, reason",
    [("h100", "float32", "needs bfloat16"), ("b200", "bfloat16", "is written for Hopper")],
)
def test_other_calls_on_a_gpu_run_blockwise_and_say_so(target, dtype, reason, caplog):
    compiled = forward_and_gradients(target, dtype=jnp.dtype(dtype))
    assert not [call for call in custom_calls(compiled) if "mosaic_gpu" in call]
    assert "takes the slow path" in caplog.text
    assert reason in caplog.text
    assert temporaries(compiled) < 4
