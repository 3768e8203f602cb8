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


def test_keys_go_on_while_blocks_are_calculated():
    """In each ring's loop the transfers are started before a kernel and awaited after it."""
    lines = compiled(16384).as_text().splitlines()
    places = [
        (line_idx, kind)
        for line_idx, line in enumerate(lines)
        for kind in ("collective-permute-start(", "collective-permute-done(", "tpu_custom_call")
        if kind in line
    ]
    print(places)


def test_temporaries_are_linear_in_the_tokens():
    small, large = (aot.temporary_bytes(compiled(T)) for T in (16384, 65536))
    print(small, large)
    assert large < 4.2 * small
    # Of a chip's queries: no array of all keys, let alone of scores.
    assert large < 20 * (65536 // 4) * H * K * 2
