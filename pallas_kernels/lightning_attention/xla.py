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
    """Where each token stands in its row."""

    is_real_BT: jax.Array  # bool
    count_BT: jax.Array  # int32, real tokens in the row up to and with this one
    run_BT: jax.Array  # int32, 0 in the row's first segment and one more after each change
    is_start_BT: jax.Array  # bool, the first token of a run other than 0


class _Decays(NamedTuple):
    """What is left of one token's writing at another token of the chunk; b is B, or 1 if shared."""

    within_bHCC: jax.Array  # at token i, of what token j wrote
    read_bHC1: jax.Array  # at token i, of the state before the chunk
    write_bHC1: jax.Array  # after the chunk, of what token j wrote
    keep_bH11: jax.Array  # after the chunk, of the state before it


@functools.partial(jax.jit, static_argnames=("chunk",))
def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    initial_state_BHKV: jax.Array,
    segment_ids_BT: jax.Array | None,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Compute in the state's dtype; linear in T in time and, with its gradient, in memory."""
    return _attend(
        chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, initial_state_BHKV, segment_ids_BT
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT):
    segments = None if segment_ids_BT is None else _locate(segment_ids_BT)
    return _forward(chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segments)


def _attend_forward(chunk, *arrays):
    return _attend(chunk, *arrays), arrays


def _attend_backward(chunk, arrays, cotangents):
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT = arrays
    dout_BTHV, dfinal_BHKV = cotangents
    segments = None if segment_ids_BT is None else _locate(segment_ids_BT)
    # dq is the same attention with the roles (q, k, v) played by (dout, v, k).
    dq_BTHK, _ = _forward(
        chunk, dout_BTHV, v_BTHV, k_BTHK, log_decay_H, state_BHKV.swapaxes(2, 3), segments,
        out_dtype=q_BTHK.dtype,
    )  # fmt: skip
    dk_BTHK, dv_BTHV, dstate_BHKV = _backward(
        chunk, q_BTHK, k_BTHK, v_BTHV, dout_BTHV, log_decay_H, dfinal_BHKV, segments
    )

    # Heads do not mix, so one tangent of ones gives every head's derivative. The compiler drops
    # all of it where nobody asks for this gradient.
    def of_decay(log_decay_H):
        return _forward(
            chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segments,
            out_dtype=log_decay_H.dtype,
        )  # fmt: skip

    _, (tout_BTHV, tfinal_BHKV) = jax.jvp(of_decay, (log_decay_H,), (jnp.ones_like(log_decay_H),))
    dlog_decay_H = jnp.einsum("bthv,bthv->h", tout_BTHV, dout_BTHV.astype(tout_BTHV.dtype))
    dlog_decay_H += jnp.einsum("bhkv,bhkv->h", tfinal_BHKV, dfinal_BHKV)
    return dq_BTHK, dk_BTHK, dv_BTHV, dlog_decay_H, dstate_BHKV, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    chunk, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segments, *, out_dtype=None
):
    """Outputs and final state."""
    decays_at = _decay_tables(chunk, log_decay_H, segments)
    cut = functools.partial(_cut, segments=segments, dtype=state_BHKV.dtype)

    def body(start, size, carry):
        state_BHKV, out_BTHV = carry
        q_BHCK, k_BHCK, v_BHCV = (cut(x, start, size) for x in (q_BTHK, k_BTHK, v_BTHV))
        decays = decays_at(start, size)
        scores_BHCC = jnp.einsum("bhik,bhjk->bhij", q_BHCK, k_BHCK) * decays.within_bHCC
        out_BHCV = jnp.einsum("bhij,bhjv->bhiv", scores_BHCC, v_BHCV)
        out_BHCV += decays.read_bHC1 * jnp.einsum("bhik,bhkv->bhiv", q_BHCK, state_BHKV)
        written_BHKV = jnp.einsum("bhjk,bhjv->bhkv", k_BHCK, decays.write_bHC1 * v_BHCV)
        state_BHKV = decays.keep_bH11 * state_BHKV + written_BHKV
        return state_BHKV, _paste(out_BTHV, out_BHCV, start)

    out_BTHV = jnp.zeros(v_BTHV.shape, q_BTHK.dtype if out_dtype is None else out_dtype)
    state_BHKV, out_BTHV = _each_chunk(q_BTHK.shape[1], chunk, body, (state_BHKV, out_BTHV))
    return out_BTHV, state_BHKV


def _backward(
    chunk, q_BTHK, k_BTHK, v_BTHV, dout_BTHV, log_decay_H, dstate_BHKV, segments
):
    """Gradients of k, v and the initial state, from the last chunk to the first."""
    decays_at = _decay_tables(chunk, log_decay_H, segments)
    cut = functools.partial(_cut, segments=segments, dtype=dstate_BHKV.dtype)

    def body(start, size, carry):
        dstate_BHKV, dk_BTHK, dv_BTHV = carry
        q_BHCK, k_BHCK, v_BHCV, dout_BHCV = (
            cut(x, start, size) for x in (q_BTHK, k_BTHK, v_BTHV, dout_BTHV)
        )
        decays = decays_at(start, size)
        scores_BHCC = jnp.einsum("bhik,bhjk->bhij", q_BHCK, k_BHCK) * decays.within_bHCC
        dscores_BHCC = jnp.einsum("bhiv,bhjv->bhij", dout_BHCV, v_BHCV) * decays.within_bHCC
        dk_BHCK = jnp.einsum("bhij,bhik->bhjk", dscores_BHCC, q_BHCK)
        dk_BHCK += decays.write_bHC1 * jnp.einsum("bhjv,bhkv->bhjk", v_BHCV, dstate_BHKV)
        dv_BHCV = jnp.einsum("bhij,bhiv->bhjv", scores_BHCC, dout_BHCV)
        dv_BHCV += decays.write_bHC1 * jnp.einsum("bhjk,bhkv->bhjv", k_BHCK, dstate_BHKV)
        read_BHKV = jnp.einsum("bhik,bhiv->bhkv", q_BHCK, decays.read_bHC1 * dout_BHCV)
        dstate_BHKV = decays.keep_bH11 * dstate_BHKV + read_BHKV
        return dstate_BHKV, _paste(dk_BTHK, dk_BHCK, start), _paste(dv_BTHV, dv_BHCV, start)

    carry = dstate_BHKV, jnp.zeros_like(k_BTHK), jnp.zeros_like(v_BTHV)
    carry = _each_chunk(q_BTHK.shape[1], chunk, body, carry, reverse=True)
    dstate_BHKV, dk_BTHK, dv_BTHV = carry
    return dk_BTHK, dv_BTHV, dstate_BHKV


def _each_chunk(
    length: int,
    chunk: int,
    body: Callable[[Any, int, Any], Any],
    carry: Any,
    reverse: bool = False,
) -> Any:
    """Run `body(start, size, carry)` over whole chunks in a loop, and over what is left apart."""
    whole, rest = divmod(length, chunk)

    def step(index, carry):
        return body((whole - 1 - index if reverse else index) * chunk, chunk, carry)

    if rest and reverse:
        carry = body(whole * chunk, rest, carry)
    carry = jax.lax.fori_loop(0, whole, step, carry) if whole else carry
    if rest and not reverse:
        carry = body(whole * chunk, rest, carry)
    return carry


def _cut(x_BTHK, start, size, *, segments, dtype):
    """One chunk as `[B, H, C, K]` in `dtype`, its padding set to zero."""
    x_BCHK = jax.lax.dynamic_slice_in_dim(x_BTHK, start, size, axis=1).astype(dtype)
    if segments is not None:
        is_real_BC = jax.lax.dynamic_slice_in_dim(segments.is_real_BT, start, size, axis=1)
        x_BCHK = jnp.where(is_real_BC[:, :, None, None], x_BCHK, 0.0)
    return x_BCHK.swapaxes(1, 2)


def _paste(x_BTHK, chunk_BHCK, start):
    chunk_BCHK = chunk_BHCK.swapaxes(1, 2).astype(x_BTHK.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BTHK, chunk_BCHK, start, axis=1)


def _locate(segment_ids_BT: jax.Array) -> _Segments:
    """Number the runs of equal ids in each row, padding (0) not interrupting a run."""
    is_real_BT = segment_ids_BT != 0
    # The id of the last real token up to and with this one; 0 before the first.
    current_BT = jax.lax.associative_scan(
        lambda earlier, later: jnp.where(later != 0, later, earlier), segment_ids_BT, axis=1
    )
    before_BT = jnp.pad(current_BT, ((0, 0), (1, 0)))[:, :-1]
    is_start_BT = (before_BT != 0) & (current_BT != before_BT)
    return _Segments(
        is_real_BT=is_real_BT,
        count_BT=jnp.cumsum(is_real_BT, axis=1, dtype=jnp.int32),
        run_BT=jnp.cumsum(is_start_BT, axis=1, dtype=jnp.int32),
        is_start_BT=is_start_BT,
    )


def _decay_tables(
    chunk: int, log_decay_H: jax.Array, segments: _Segments | None
) -> Callable[[Any, int], _Decays]:
    """A function (start, size) -> decays of that chunk; without segments there is one table."""
    if segments is None:

        def table(size):
            count_1C = jnp.arange(1, size + 1, dtype=jnp.int32)[None, :]
            run_1C = jnp.zeros_like(count_1C)
            return _decays(log_decay_H, count_1C, run_1C, run_1C[:, 0])

        shared = table(chunk)
        return lambda start, size: shared if size == chunk else table(size)

    def at(start, size):
        is_real_BC, count_BC, run_BC, is_start_BC = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in segments
        )
        before_B1 = count_BC[:, :1] - is_real_BC[:, :1].astype(jnp.int32)
        run_before_B = run_BC[:, 0] - is_start_BC[:, 0].astype(jnp.int32)
        return _decays(log_decay_H, count_BC - before_B1, run_BC, run_before_B)

    return at


def _decays(log_decay_H, count_bC, run_bC, run_before_b) -> _Decays:
    """Decays of a chunk whose token i is its `count`-th real one and belongs to run `run`."""

    def power(tokens_bCC, is_open_bCC):
        tokens_b1CC = tokens_bCC.astype(log_decay_H.dtype)[:, None]
        exponent_bHCC = tokens_b1CC * log_decay_H[None, :, None, None]
        return jnp.exp(jnp.where(is_open_bCC[:, None], exponent_bHCC, -jnp.inf))

    size = count_bC.shape[1]
    is_causal_1CC = (jnp.arange(size)[:, None] >= jnp.arange(size)[None, :])[None]
    is_same_run_bCC = run_bC[:, :, None] == run_bC[:, None, :]
    total_b1, last_run_b1, run_before_b1 = count_bC[:, -1:], run_bC[:, -1:], run_before_b[:, None]
    return _Decays(
        within_bHCC=power(
            count_bC[:, :, None] - count_bC[:, None, :], is_causal_1CC & is_same_run_bCC
        ),
        read_bHC1=power(count_bC[:, :, None], (run_bC == run_before_b1)[:, :, None]),
        write_bHC1=power((total_b1 - count_bC)[:, :, None], (run_bC == last_run_b1)[:, :, None]),
        keep_bH11=power(total_b1[:, :, None], (last_run_b1 == run_before_b1)[:, :, None]),
    )
