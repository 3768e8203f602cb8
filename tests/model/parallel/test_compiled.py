"""The compiler for TPUs takes the ring with splash attention inside, in memory linear in T."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from tests import aot
from tests.model.parallel import program, rows

pytestmark = pytest.mark.aot
SPLASH = ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]
# Of Text-01, its attention heads split over 8 chips.
H, G, K = 8, 1, 128


@functools.cache
def compiled(T: int, method: str = "ring"):
    """Forward and gradients of one packed row, its tokens over 4 chips."""
    mesh = rows.make_mesh(aot.devices("v5p:2x2x1"), sequence=4)

    def array(spec, shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, kv = (array(rows.ROWS, (1, T, heads, K)) for heads in (H, G))
    ids = array(rows.IDS, (1, T), jnp.int32)
    return rows.program(mesh, method=method).lower(q, kv, kv, ids, q).compile()


def test_the_ring_is_splash_attention_and_permutes():
    text = compiled(16384).as_text()
    assert sorted(set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))) == SPLASH
    # The only loops are the two rings: the blockwise implementation would loop inside them.
    assert len(re.findall(r" while\(", text)) == 2
    assert {x.kind for x in program.collectives(compiled(16384))} == {"collective-permute"}


def test_temporaries_are_linear_in_the_tokens():
    # Shorter rows fit VMEM in part, which is not counted.
    small, large = (aot.temporary_bytes(compiled(T)) for T in (65536, 131072))
    assert large < 2.2 * small
    # Of a chip's queries, 18 times their bytes; its own scores alone would be 512 times as many.
    assert large < 20 * (131072 // 4) * H * K * 2


def test_no_chip_holds_the_keys_of_the_row():
    T = 131072
    lengths = re.findall(rf"(?:bf16|f32)\[(?:\d+,)*{T}(?:,\d+)*\]", compiled(T).as_text())
    assert not lengths
