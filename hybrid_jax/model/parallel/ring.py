"""Ring attention: each device keeps its queries, and the keys and values go round.

Two halves of a device's tokens stand apart in the row (balance.py), so of the keys that arrive from
another device half a device's scores are visible: two blocks of a chunk of queries by a chunk of
keys, whoever sent them. The later queries see the earlier keys. Where the sender stands before the
device in the ring the earlier queries see those too; where it stands behind, the later queries see
all its keys. No block is calculated in vain, and only a device's own keys need a causal mask.

The gradient is a second ring, in which dk and dv travel with their keys and take up what every
device adds. Nothing is ever larger than a device's share.

Local letters beside the house alphabet: C = tokens of a chunk, T = 2C those of a device, Z = 2B
rows of two blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.model import remat
from hybrid_jax.model.parallel import balance
from pallas_kernels import softmax_attention_block, softmax_attention_block_gradients
from pallas_kernels.softmax_attention.api import SOFTMAX_RESULTS
from pallas_kernels.varying import alike
from sharding import Axis


class Ring(NamedTuple):
    """What is static of a call."""

    axis: Axis
    implementation: str | None


class Blocks(NamedTuple):
    """Two blocks, one above the other along the batch: low or high chunk of queries and of keys."""

    behind: jax.Array
    """Whether the keys come from a device behind this one."""
    q_segment_ZC: jax.Array | None
    kv_segment_ZC: jax.Array | None

    def queries(self, x_BTHK):
        """The later queries, and those that see the other block."""
        low, high = _halves(x_BTHK)
        return jnp.concatenate([high, jnp.where(self.behind, high, low)])

    def keys(self, x_BTGK):
        """The earlier keys, twice; or the earlier and the later ones."""
        low, high = _halves(x_BTGK)
        return jnp.concatenate([low, jnp.where(self.behind, high, low)])

    def add_queries(self, halves, d_ZCHK):
        """The low and high half with what the two blocks give to their queries."""
        low, high = halves
        first, second = jnp.split(d_ZCHK.astype(low.dtype), 2)
        nothing = jnp.zeros_like(second)
        low += jnp.where(self.behind, nothing, second)
        return low, high + (first + jnp.where(self.behind, second, nothing))

    def add_keys(self, x_BTGK, d_ZCGK):
        """x with what the two blocks give to their keys."""
        first, second = jnp.split(d_ZCGK.astype(x_BTGK.dtype), 2)
        nothing = jnp.zeros_like(second)
        low = first + jnp.where(self.behind, nothing, second)
        high = jnp.where(self.behind, second, nothing)
        return x_BTGK + jnp.concatenate([low, high], axis=1)

    @property
    def options(self) -> dict:
        """Arguments of both functions on blocks."""
        return _options(self.q_segment_ZC, self.kv_segment_ZC, causal=False)


def ring_attention(ring: Ring, q_BTHK, k_BTGK, v_BTGV, segment_ids):
    """Causal attention of rows split over the ring's axis; `segment_ids` of the whole rows."""
    return _ring_attention(ring, *alike(q_BTHK, k_BTGK, v_BTGV, segment_ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: Ring, q_BTHK, k_BTGK, v_BTGV, segment_ids):
    return _forward(ring, q_BTHK, k_BTGK, v_BTGV, segment_ids)[0]


def _forward(ring: Ring, q_BTHK, k_BTGK, v_BTGV, segment_ids):
    q_BTHK, k_BTGK, v_BTGV = (
        checkpoint_name(balance.deal(x, ring.axis), remat.DEALT) for x in (q_BTHK, k_BTGK, v_BTGV)
    )
    own = _own_options(ring, segment_ids)
    out_BTHV, logsumexp_BTH = softmax_attention_block(
        q_BTHK, k_BTGK, v_BTGV, **own, implementation=ring.implementation
    )

    def attend(step, results, keys):
        blocks = blocks_of_step(ring, segment_ids, step)
        found = softmax_attention_block(
            *(blocks.queries(q_BTHK), *map(blocks.keys, keys)),
            **blocks.options,
            implementation=ring.implementation,
        )
        return _merge(blocks, results, found)

    def one_step(carry, step):
        *results, k_BTGK, v_BTGV = carry
        # Sent on before they are used, so that the next keys are under way meanwhile.
        following = _pass_on(ring, k_BTGK, v_BTGV)
        return (*attend(step, results, (k_BTGK, v_BTGV)), *following), None

    # Results stay in halves from step to step: on TPU each concatenation is a pass of its own.
    results = _halves(out_BTHV.astype(jnp.float32)), _halves(logsumexp_BTH)
    carry = (*results, *_pass_on(ring, k_BTGK, v_BTGV))
    last = lax.axis_size(ring.axis) - 1
    *results, k, v = _scan(one_step, carry, last)
    out_halves, logsumexp_halves = attend(last, results, (k, v))
    out_BTHV, logsumexp_BTH = (
        checkpoint_name(x, SOFTMAX_RESULTS)
        for x in (_join(out_halves).astype(q_BTHK.dtype), _join(logsumexp_halves))
    )
    residuals = q_BTHK, k_BTGK, v_BTGV, segment_ids, out_BTHV, logsumexp_BTH
    return balance.collect(out_BTHV, ring.axis), residuals


def _backward(ring: Ring, residuals, d_out_BTHV):
    q_BTHK, k_BTGK, v_BTGV, segment_ids, *results = residuals
    results = *results, balance.deal(d_out_BTHV, ring.axis)
    own = softmax_attention_block_gradients(
        *(q_BTHK, k_BTGK, v_BTGV, *results),
        **_own_options(ring, segment_ids),
        implementation=ring.implementation,
    )

    def add(step, gradients, keys):
        blocks = blocks_of_step(ring, segment_ids, step)
        dq_ZCHK, dk_ZCGK, dv_ZCGV = softmax_attention_block_gradients(
            *(blocks.queries(q_BTHK), *map(blocks.keys, keys), *map(blocks.queries, results)),
            **blocks.options,
            implementation=ring.implementation,
        )
        dq_halves, dk_BTGK, dv_BTGV = gradients
        # Those of the keys are a step behind them and arrive while the blocks are calculated.
        dk_BTGK, dv_BTGV = _pass_on(ring, dk_BTGK, dv_BTGV)
        return (
            blocks.add_queries(dq_halves, dq_ZCHK),
            blocks.add_keys(dk_BTGK, dk_ZCGK),
            blocks.add_keys(dv_BTGV, dv_ZCGV),
        )

    def one_step(carry, step):
        *gradients, k_BTGK, v_BTGV = carry
        following = _pass_on(ring, k_BTGK, v_BTGV)
        return (*add(step, gradients, (k_BTGK, v_BTGV)), *following), None

    # Sums of as many terms as devices: float32, also on their way.
    dq, dk, dv = (x.astype(jnp.float32) for x in own)
    carry = (_halves(dq), dk, dv, *_pass_on(ring, k_BTGK, v_BTGV))
    last = lax.axis_size(ring.axis) - 1
    *gradients, k, v = _scan(one_step, carry, last)
    dq_halves, dk, dv = add(last, gradients, (k, v))
    gradients = _join(dq_halves), *_pass_on(ring, dk, dv)
    arrays = q_BTHK, k_BTGK, v_BTGV
    gradients = (d.astype(x.dtype) for d, x in zip(gradients, arrays, strict=True))
    return *(balance.collect(x, ring.axis) for x in gradients), None


_ring_attention.defvjp(_forward, _backward)


def _scan(one_step, carry, last: int):
    """The steps between the first and the last, after which nothing is passed on."""
    if last == 1:
        return carry
    carry, _ = lax.scan(one_step, carry, jnp.arange(1, last, dtype=jnp.int32))
    return carry


def _pass_on(ring: Ring, *arrays):
    """To the next device; from the one before."""
    size = lax.axis_size(ring.axis)
    places = [(device, (device + 1) % size) for device in range(size)]
    return tuple(lax.ppermute(x, ring.axis, places) for x in arrays)


def _merge(blocks: Blocks, results, found):
    """Results of the low and the high queries, over the keys of the two blocks too."""
    (out_low, out_high), (logsumexp_low, logsumexp_high) = results
    (first, second), (sum_first, sum_second) = (jnp.split(x, 2) for x in found)
    # The second block counts for one half: no part of it has any weight in the other.
    sum_low = jnp.where(blocks.behind, -jnp.inf, sum_second)
    sum_high = jnp.where(blocks.behind, sum_second, -jnp.inf)
    low = _mean((out_low, logsumexp_low), (second, sum_low))
    high = _mean((out_high, logsumexp_high), (first, sum_first), (second, sum_high))
    return tuple(zip(low, high, strict=True))


def _mean(*parts):
    """Outputs are means of values: theirs, weighted by the sums of exp(score) they are of."""
    total_BCH = functools.reduce(jnp.logaddexp, (sum_BCH for _, sum_BCH in parts))
    shares = (jnp.exp(sum_BCH - total_BCH)[..., None] for _, sum_BCH in parts)
    outs = (out_BCHV.astype(jnp.float32) for out_BCHV, _ in parts)
    return sum(share * out for share, out in zip(shares, outs, strict=True)), total_BCH


def _halves(x_BTHK):
    return tuple(jnp.split(x_BTHK, 2, axis=1))


def _join(halves):
    return jnp.concatenate(halves, axis=1)


def blocks_of_step(ring: Ring, segment_ids, step) -> Blocks:
    """The two blocks of a step, with the keys of the device `step` places before in the ring."""
    device, size = lax.axis_index(ring.axis), lax.axis_size(ring.axis)
    sender = (device - step) % size
    behind = sender > device
    if segment_ids is None:
        return Blocks(behind, None, None)
    blocks = Blocks(behind, None, None)
    q_segment_BT, kv_segment_BT = (_segments(segment_ids, d, size) for d in (device, sender))
    return Blocks(behind, blocks.queries(q_segment_BT), blocks.keys(kv_segment_BT))


def _own_options(ring: Ring, segment_ids) -> dict:
    """Arguments for a device's queries and its own keys: in order, so causality is as ever."""
    own = None
    if segment_ids is not None:
        own = _segments(segment_ids, lax.axis_index(ring.axis), lax.axis_size(ring.axis))
    return _options(own, own, causal=True)


def _options(q_segment_BT, kv_segment_BS, causal: bool) -> dict:
    return dict(q_segment_ids=q_segment_BT, kv_segment_ids=kv_segment_BS, causal=causal)


def _segments(segment_ids, device, size: int):
    """Those of the two chunks that a device holds."""
    chunk = segment_ids.shape[1] // (2 * size)
    return jnp.concatenate(
        [
            lax.dynamic_slice_in_dim(segment_ids, place * chunk, chunk, axis=1)
            for place in (device, 2 * size - 1 - device)
        ],
        axis=1,
    )
