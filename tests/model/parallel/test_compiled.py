"""The compiler for TPUs takes the ring with splash attention inside, in memory linear in T."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from tests import aot
from tests.model.parallel import collectives, rows

pytestmark = pytest.mark.aot
SPLASH = ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
# Of Text-01, its attention heads split over 8 chips.
H, G, K = 8, 1, 128
# Long enough that what a chip keeps in VMEM, which is not counted, is little of it.
T = 131072


@functools.cache
def compiled(length: int):
    """Forward and gradients of one packed row, its tokens over 4 chips."""
    mesh = rows.make_mesh(aot.devices("v5p:2x2x1"), sequence=4)

    def array(spec, shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, kv = (array(rows.ROWS, (1, length, heads, K)) for heads in (H, G))
    ids = array(rows.IDS, (1, length), jnp.int32)
    return rows.program(mesh).lower(q, kv, kv, ids, q).compile()


def test_the_ring_is_splash_attention_and_permutes():
    text = compiled(T).as_text()
    assert sorted(set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))) == SPLASH
    # The only loops are the two rings: the blockwise implementation would loop inside them.
    assert len(re.findall(r" while\(", text)) == 2
    assert {x.kind for x in collectives.of(compiled(T))} == {"collective-permute"}


def test_temporaries_are_linear_in_the_tokens():
    small, large = (aot.temporary_bytes(compiled(length)) for length in (T, 2 * T))
    assert large < 2.1 * small
    # 18 times the bytes of a chip's queries; its own scores in float32 would be 512 times those.
    assert small < 20 * (T // 4) * H * K * 2


def test_no_chip_holds_the_keys_of_the_row():
    lengths = re.findall(rf"(?:bf16|f32)\[(?:\d+,)*{T}(?:,\d+)*\]", compiled(T).as_text())
    assert not lengths
