"""The TPU compiler takes split lightning attention at the sizes of MiniMax-Text-01."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.model.parallel import lightning
from tests import aot
from tests.model.parallel import collectives

pytestmark = pytest.mark.aot
_HEADS, _SIZE = 64, 128
_DECAYS = -np.asarray(2.0 ** (-np.arange(1, _HEADS + 1) / 8), np.float32)
_TIME = P(None, "sequence")


def _compile(length: int, with_ids: bool):
    """Forward and gradient on four chips."""
    mesh = jax.sharding.Mesh(np.array(aot.devices("v5p:2x2x1")), ("sequence",))

    def attend(q, k, v, ids):
        return lightning.lightning_attention(q, k, v, _DECAYS, axis="sequence", segment_ids_BT=ids)

    split = jax.shard_map(
        attend, mesh=mesh, in_specs=(_TIME, _TIME, _TIME, P()), out_specs=(_TIME, P())
    )

    def gradients(q, k, v, ids, dfinal):
        (out, final), pullback = jax.vjp(lambda *qkv: split(*qkv, ids), q, k, v)
        return out, final, pullback((out, dfinal))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    x = array((1, length, _HEADS, _SIZE), jnp.bfloat16, _TIME)
    ids = array((1, length), jnp.int32, P()) if with_ids else None
    dfinal = array((1, _HEADS, _SIZE, _SIZE), jnp.float32, P())
    return jax.jit(gradients).lower(x, x, x, ids, dfinal).compile()


@pytest.mark.parametrize(("length", "with_ids"), [(131072, True), (131072, False), (16384, False)])
def test_four_chips_exchange_states_alone_whatever_the_length(length, with_ids):
    compiled = _compile(length, with_ids)
    # A state from every shard in each direction, and nothing else.
    a_state = 4 * _HEADS * _SIZE * _SIZE
    found = collectives.of(compiled)
    assert [one.kind for one in found] == ["all-gather"] * 2
    assert [one.num_bytes for one in found] == [4 * a_state] * 2
    # states; out; states' gradients; dq; dk and dv
    assert len(aot.tpu_kernels(compiled)) == 5
    # Nothing of the length of the row is copied: 4.2 states measured at 131072 tokens.
    assert aot.temporary_bytes(compiled) <= 6 * a_state
