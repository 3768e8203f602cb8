"""Lightning attention chunk by chunk in plain XLA: runs anywhere, the choice for CPUs.

A chunk of C tokens reads the state before it once, attends within itself by a masked C x C matrix
of decays, and moves the state on. Chunks are cut out of `[B, T, H, *]` where they lie, one after
the other: on a CPU that beats arranging all chunks first, which moves every array through memory
twice more. The gradient recomputes the states instead of storing them.

No decay is ever split into exp(-x) exp(+x), and exponents are masked before exp: at a decay of
exp(-0.917) the unmasked half of a matrix of 98 tokens overflows float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Tokens a chunk. Measured on 2 CPU cores, float32, head sizes 64 and 128: 64 is the fastest or
# within a tenth of it; the C x C work grows with C, and below 32 the matmuls are too small.
_CHUNK = 64


class _Segments(NamedTuple):
    """Where segments begin and where there is padding."""

    is_real_BT: jax.Array  # bool
    is_change_BT: jax.Array  # bool, a real token whose id is not that of the real one before it


class _Decays(NamedTuple):
    """What is left of one token's writing at another token of the chunk; b is B, or 1 if shared."""

    within_bHCC: jax.Array  # at token i, of what token j wrote
    read_bHC1: jax.Array  # at token i, of the state before the chunk
    write_bHC1: jax.Array  # after the chunk, of what token j wrote
    keep_bH11: jax.Array  # after the chunk, of the state before it


def forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    state_BHKV: jax.Array,
    segment_ids_BT: jax.Array | None,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and final state, computed in the state's dtype; linear in T in time and memory."""
    segments = None if segment_ids_BT is None else locate(segment_ids_BT)
    return _forward(chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segments)


def backward(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT, dout_BTHV, dfinal_BHKV,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of q, k, v and the initial state."""
    segments = None if segment_ids_BT is None else locate(segment_ids_BT)
    # dq is the same attention with the roles (q, k, v) played by (dout, v, k).
    dq_BTHK, _ = _forward(
        chunk, dout_BTHV, v_BTHV, k_BTHK, log_decay_H, state_BHKV.swapaxes(2, 3), segments,
        out_dtype=q_BTHK.dtype,
    )  # fmt: skip
    dk_BTHK, dv_BTHV, dstate_BHKV = _backward(
        chunk, q_BTHK, k_BTHK, v_BTHV, dout_BTHV, log_decay_H, dfinal_BHKV, segments
    )
    return dq_BTHK, dk_BTHK, dv_BTHV, dstate_BHKV


def decay_gradient(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT, dout_BTHV, dfinal_BHKV,
    chunk: int = _CHUNK,
) -> jax.Array:  # fmt: skip
    """Gradient of the log decays, by the derivative of the whole forward pass along them."""
    segments = None if segment_ids_BT is None else locate(segment_ids_BT)

    # Heads do not mix, so one tangent of ones gives every head's derivative.
    def of_decay(log_decay_H):
        return _forward(
            chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segments,
            out_dtype=log_decay_H.dtype,
        )  # fmt: skip

    _, (tout_BTHV, tfinal_BHKV) = jax.jvp(of_decay, (log_decay_H,), (jnp.ones_like(log_decay_H),))
    dlog_decay_H = jnp.einsum("bthv,bthv->h", tout_BTHV, dout_BTHV.astype(tout_BTHV.dtype))
    return dlog_decay_H + jnp.einsum("bhkv,bhkv->h", tfinal_BHKV, dfinal_BHKV)


def _forward(chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segments, *, out_dtype=None):
    """Outputs and final state."""
    decays_at = _decay_tables(chunk, log_decay_H, segments)
    cut = functools.partial(_cut, chunk=chunk, segments=segments, dtype=state_BHKV.dtype)

    def body(index, size, carry):
        state_BHKV, out_BTHV = carry
        q_BHCK, k_BHCK, v_BHCV = (cut(x, index, size) for x in (q_BTHK, k_BTHK, v_BTHV))
        decays = decays_at(index, size)
        scores_BHCC = jnp.einsum("bhik,bhjk->bhij", q_BHCK, k_BHCK) * decays.within_bHCC
        out_BHCV = jnp.einsum("bhij,bhjv->bhiv", scores_BHCC, v_BHCV)
        out_BHCV += decays.read_bHC1 * jnp.einsum("bhik,bhkv->bhiv", q_BHCK, state_BHKV)
        written_BHKV = jnp.einsum("bhjk,bhjv->bhkv", k_BHCK, decays.write_bHC1 * v_BHCV)
        state_BHKV = decays.keep_bH11 * state_BHKV + written_BHKV
        return state_BHKV, _paste(out_BTHV, out_BHCV, index * chunk)

    out_BTHV = jnp.zeros_like(v_BTHV, dtype=q_BTHK.dtype if out_dtype is None else out_dtype)
    state_BHKV, out_BTHV = each_chunk(q_BTHK.shape[1], chunk, body, (state_BHKV, out_BTHV))
    return out_BTHV, state_BHKV


def _backward(chunk, q_BTHK, k_BTHK, v_BTHV, dout_BTHV, log_decay_H, dstate_BHKV, segments):
    """Gradients of k, v and the initial state, from the last chunk to the first."""
    decays_at = _decay_tables(chunk, log_decay_H, segments)
    cut = functools.partial(_cut, chunk=chunk, segments=segments, dtype=dstate_BHKV.dtype)

    def body(index, size, carry):
        dstate_BHKV, dk_BTHK, dv_BTHV = carry
        q_BHCK, k_BHCK, v_BHCV, dout_BHCV = (
            cut(x, index, size) for x in (q_BTHK, k_BTHK, v_BTHV, dout_BTHV)
        )
        decays = decays_at(index, size)
        scores_BHCC = jnp.einsum("bhik,bhjk->bhij", q_BHCK, k_BHCK) * decays.within_bHCC
        dscores_BHCC = jnp.einsum("bhiv,bhjv->bhij", dout_BHCV, v_BHCV) * decays.within_bHCC
        dk_BHCK = jnp.einsum("bhij,bhik->bhjk", dscores_BHCC, q_BHCK)
        dk_BHCK += decays.write_bHC1 * jnp.einsum("bhjv,bhkv->bhjk", v_BHCV, dstate_BHKV)
        dv_BHCV = jnp.einsum("bhij,bhiv->bhjv", scores_BHCC, dout_BHCV)
        dv_BHCV += decays.write_bHC1 * jnp.einsum("bhjk,bhkv->bhjv", k_BHCK, dstate_BHKV)
        read_BHKV = jnp.einsum("bhik,bhiv->bhkv", q_BHCK, decays.read_bHC1 * dout_BHCV)
        dstate_BHKV = decays.keep_bH11 * dstate_BHKV + read_BHKV
        start = index * chunk
        return dstate_BHKV, _paste(dk_BTHK, dk_BHCK, start), _paste(dv_BTHV, dv_BHCV, start)

    carry = dstate_BHKV, jnp.zeros_like(k_BTHK), jnp.zeros_like(v_BTHV)
    carry = each_chunk(q_BTHK.shape[1], chunk, body, carry, reverse=True)
    dstate_BHKV, dk_BTHK, dv_BTHV = carry
    return dk_BTHK, dv_BTHV, dstate_BHKV


def each_chunk(
    length: int,
    chunk: int,
    body: Callable[[Any, int, Any], Any],
    carry: Any,
    reverse: bool = False,
) -> Any:
    """Run `body(index, size, carry)` over whole chunks in a loop, and over what is left apart."""
    whole, rest = divmod(length, chunk)

    def step(index, carry):
        return body(whole - 1 - index if reverse else index, chunk, carry)

    if rest and reverse:
        carry = body(whole, rest, carry)
    carry = jax.lax.fori_loop(0, whole, step, carry) if whole else carry
    if rest and not reverse:
        carry = body(whole, rest, carry)
    return carry


def _cut(x_BTHK, index, size, *, chunk, segments, dtype):
    """One chunk as `[B, H, C, K]` in `dtype`, its padding set to zero."""
    start = index * chunk
    x_BCHK = jax.lax.dynamic_slice_in_dim(x_BTHK, start, size, axis=1).astype(dtype)
    if segments is not None:
        is_real_BC = jax.lax.dynamic_slice_in_dim(segments.is_real_BT, start, size, axis=1)
        x_BCHK = jnp.where(is_real_BC[:, :, None, None], x_BCHK, 0.0)
    return x_BCHK.swapaxes(1, 2)


def _paste(x_BTHK, chunk_BHCK, start):
    chunk_BCHK = chunk_BHCK.swapaxes(1, 2).astype(x_BTHK.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BTHK, chunk_BCHK, start, axis=1)


def locate(segment_ids_BT: jax.Array) -> _Segments:
    """Find the changes of id; padding (0) is none, nor are equal ids on both sides of it."""
    is_real_BT = segment_ids_BT != 0
    index_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None, :]
    latest_BT = jax.lax.cummax(jnp.where(is_real_BT, index_1T, 0), axis=1)
    # The id of the last real token up to and with this one; 0 if there is none.
    current_BT = jnp.take_along_axis(segment_ids_BT, latest_BT, axis=1)
    before_BT = jnp.pad(current_BT, ((0, 0), (1, 0)))[:, :-1]
    return _Segments(is_real_BT, (before_BT != 0) & (current_BT != before_BT))


def _decay_tables(
    chunk: int, log_decay_H: jax.Array, segments: _Segments | None
) -> Callable[[Any, int], _Decays]:
    """A function (index, size) -> decays of that chunk; without segments there is one table."""
    if segments is None:

        def table(size):
            count_1C = jnp.arange(1, size + 1, dtype=jnp.int32)[None, :]
            return _decays(log_decay_H, count_1C, jnp.zeros_like(count_1C))

        shared = table(chunk)
        return lambda index, size: shared if size == chunk else table(size)

    def at(index, size):
        count_BC, run_BC = (
            jnp.cumsum(
                jax.lax.dynamic_slice_in_dim(is_counted_BT, index * chunk, size, axis=1),
                axis=1,
                dtype=jnp.int32,
            )
            for is_counted_BT in segments
        )
        return _decays(log_decay_H, count_BC, run_BC)

    return at


def _decays(log_decay_H, count_bC, run_bC) -> _Decays:
    """Decays of a chunk whose token i is its `count`-th real one and follows `run` changes."""

    def power(tokens_bCC, is_open_bCC):
        exponent_bHCC = tokens_bCC[:, None] * log_decay_H[None, :, None, None]
        return jnp.exp(jnp.where(is_open_bCC[:, None], exponent_bHCC, -jnp.inf))

    count_bC, run_bC = count_bC.astype(log_decay_H.dtype), run_bC.astype(log_decay_H.dtype)
    size = count_bC.shape[1]
    is_past_1CC = (jnp.arange(size)[:, None] >= jnp.arange(size)[None, :])[None]
    count_bC1, run_bC1 = count_bC[:, :, None], run_bC[:, :, None]
    total_b11, last_run_b11 = count_bC1[:, -1:], run_bC1[:, -1:]
    return _Decays(
        within_bHCC=power(_differences(count_bC), is_past_1CC & (_differences(run_bC) == 0)),
        read_bHC1=power(count_bC1, run_bC1 == 0),
        write_bHC1=power(total_b11 - count_bC1, run_bC1 == last_run_b11),
        keep_bH11=power(total_b11, last_run_b11 == 0),
    )


def _differences(x_bC: jax.Array) -> jax.Array:
    """x_i - x_j of all pairs, exact for integers below 2^24.

    As a matmul, so that XLA stores the result: fused into the exponentials, the differences keep
    them from being vectorised on CPUs (measured: a third of the forward pass).
    """
    one_bC = jnp.ones_like(x_bC)
    left_bC2, right_bC2 = jnp.stack([x_bC, one_bC], axis=2), jnp.stack([one_bC, -x_bC], axis=2)
    return jnp.einsum("bix,bjx->bij", left_bC2, right_bC2, precision="highest")
