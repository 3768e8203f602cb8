"""The arithmetic of one chunk, forward and backward, and the passes made of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.lightning_attention.pallas_tpu import layout, sizes, walk


def _dot(a, b, a_dim: int, b_dim: int):
    """Contract one dimension each, float32 sums; bfloat16 operands take one pass of the MXU."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a, b, (((a_dim,), (b_dim,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _halves(x, dtype, dim: int):
    """float32 numbers as what they round to and, behind that in `dim`, what rounding leaves out.

    With the other factor twice a product contracts both; a matrix unit of 256 has room for them.
    """
    if dtype == jnp.float32:
        return x
    high = x.astype(dtype)
    return jnp.concatenate([high, (x - high.astype(jnp.float32)).astype(dtype)], dim)


def _twice(x, dim: int):
    """The factor of `_halves`."""
    return x if x.dtype == jnp.float32 else jnp.concatenate([x, x], dim)


def _write_state(state_ref, h, write_CK, keep_1K, k_CK, v_CV) -> None:
    """S = keep S + (write * k)^T v."""
    written_CK = (write_CK * k_CK.astype(jnp.float32)).astype(k_CK.dtype)
    state_ref[h] = keep_1K * state_ref[h] + _dot(v_CV, written_CK, 0, 0)


def _read_state(dstate_ref, h, read_CK, keep_1K, q_CK, dout_CV) -> None:
    """dS = keep dS + (read * q)^T dout; of these signs differ, so that one rounding would show."""
    reading_CK = _halves(read_CK * q_CK.astype(jnp.float32), q_CK.dtype, 0)
    gained_VK = _dot(_twice(dout_CV, 0), reading_CK, 0, 0)
    dstate_ref[h] = keep_1K * dstate_ref[h] + gained_VK


def _attend_chunk(plan, chunk, state_ref, q_ref, k_ref, v_ref, out_ref, *, rounds_weights: bool):
    """out = ((q k^T) * within) v + read * (q S), then S = keep S + (write * k)^T v.

    Of a fast head's weights few count, so that rounding them shows in the result: 1.4 times its
    own rounding at a slope of 0.9, 1.11 at 0.05. A gradient has room for that.
    """
    C = plan.chunk

    def first(h, q_CK, k_CK, v_CV):
        state_VK = state_ref[h].astype(k_CK.dtype)
        # One product for the scores and for what the state gives: they share q.
        return k_CK, v_CV, _dot(q_CK, jnp.concatenate([k_CK, state_VK]), 1, 1)

    def second(h, k_CK, v_CV, both):
        within_CC, read_CX, write_CX, keep_1X = (ref[h] for ref in chunk.decays)
        V, K = state_ref.shape[1:]
        weights_CC = both[:, :C] * within_CC
        if rounds_weights:
            out_CV = _dot(weights_CC.astype(v_CV.dtype), v_CV, 1, 0)
        else:
            out_CV = _dot(_halves(weights_CC, v_CV.dtype, 1), _twice(v_CV, 0), 1, 0)
        _write_state(state_ref, h, write_CX[:, :K], keep_1X[:, :K], k_CK, v_CV)
        # The decay goes to the float32 result: on a bfloat16 q it would be rounded once more.
        return (out_CV + read_CX[:, :V] * both[:, C:],)

    _each_head(plan, chunk, (q_ref, k_ref, v_ref), first, second, (out_ref,))


def _differentiate_chunk(plan, chunk, dstate_ref, q_ref, k_ref, v_ref, dout_ref, dk_ref, dv_ref):
    """dk and dv of a chunk from the gradient of the state after it, and that of the one before."""
    C = plan.chunk

    def first(h, q_CK, k_CK, v_CV, dout_CV):
        dstate_VK = dstate_ref[h].astype(q_CK.dtype)
        # Transposed scores come out of the product as they are needed: rows are keys.
        of_k = _dot(k_CK, jnp.concatenate([q_CK, dstate_VK]), 1, 1)
        of_v = _dot(v_CV, jnp.concatenate([dout_CV, dstate_VK.T]), 1, 1)
        return q_CK, dout_CV, of_k, of_v

    def second(h, q_CK, dout_CV, of_k, of_v):
        within_CC, read_CX, write_CX, keep_1X = (ref[h] for ref in chunk.decays)
        V, K = dstate_ref.shape[1:]
        weights_CC = (of_k[:, :C] * within_CC).astype(q_CK.dtype)
        dweights_CC = (of_v[:, :C] * within_CC).astype(q_CK.dtype)
        _read_state(dstate_ref, h, read_CX[:, :K], keep_1X[:, :K], q_CK, dout_CV)
        dv_CV = _dot(weights_CC, dout_CV, 1, 0) + write_CX[:, :V] * of_k[:, C:]
        dk_CK = _dot(dweights_CC, q_CK, 1, 0) + write_CX[:, :K] * of_v[:, C:]
        return dk_CK, dv_CV

    _each_head(plan, chunk, (q_ref, k_ref, v_ref, dout_ref), first, second, (dk_ref, dv_ref))


def _write_chunk(plan, chunk, state_ref, k_ref, v_ref):
    """The state of `_attend_chunk` alone."""

    def second(h, k_CK, v_CV):
        _, _, write_CX, keep_1X = (ref[h] for ref in chunk.decays)
        K = k_CK.shape[1]
        _write_state(state_ref, h, write_CX[:, :K], keep_1X[:, :K], k_CK, v_CV)
        return ()

    _each_head(plan, chunk, (k_ref, v_ref), lambda h, *operands: operands, second, ())


def _read_chunk(plan, chunk, dstate_ref, q_ref, dout_ref):
    """The state's gradient of `_differentiate_chunk` alone."""

    def second(h, q_CK, dout_CV):
        _, read_CX, _, keep_1X = (ref[h] for ref in chunk.decays)
        K = q_CK.shape[1]
        _read_state(dstate_ref, h, read_CX[:, :K], keep_1X[:, :K], q_CK, dout_CV)
        return ()

    _each_head(plan, chunk, (q_ref, dout_ref), lambda h, *operands: operands, second, ())


def _each_head(plan, chunk, inputs, first, second, outputs) -> None:
    """Both halves for every head, the second half of a group after the first half of the next.

    `first(head, *inputs)` gives what `second(head, *)` takes, and that one the outputs. In this
    order the compiler finds products to issue while it waits for others' results: a quarter fewer
    cycles than head after head (tpu7x, backward).
    """

    def start(group):
        read = (plan.layout.read(ref, chunk.start, plan.chunk, group) for ref in inputs)
        return [
            first(h, *map(chunk.mask, operands)) for h, *operands in zip(group, *read, strict=True)
        ]

    def finish(group, found):
        results = [second(h, *one) for h, one in zip(group, found, strict=True)]
        for ref, values in zip(outputs, zip(*results, strict=True), strict=True):
            plan.layout.write(ref, chunk.start, group, values)

    groups = plan.layout.groups()
    waiting = groups[0], start(groups[0])
    for group in groups[1:]:
        found = start(group)
        finish(*waiting)
        waiting = group, found
    finish(*waiting)


def _plan(
    q_BTHK, v_BTHV, segment_ids_BT, chosen: sizes.Size, *, is_reversed: bool, interpret: Any
) -> walk.Plan:
    (B, T, H, K), V = q_BTHK.shape, v_BTHV.shape[3]
    block_chunks = min(chosen.block_chunks, -(-T // chosen.chunk))
    writes_words = not interpret or compat.INTERPRETS_STORES_OF_BITCAST
    return walk.Plan(
        layout=layout.choose(H, K, V, q_BTHK.dtype, writes_words),
        lengths=(B, T, H),
        lanes=max(K, V),
        dtype=q_BTHK.dtype,
        chunk=chosen.chunk,
        block_chunks=block_chunks,
        is_reversed=is_reversed,
        has_spans=segment_ids_BT is not None or T % (chosen.chunk * block_chunks) != 0,
    )


def _operands(*arrays):
    """All in one dtype that the MXU takes: bfloat16 if they are, else float32."""
    dtypes = {x.dtype for x in arrays}
    dtype = jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.float32
    return [x.astype(dtype) for x in arrays]


def forward(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT,
    *, interpret: Any = False, chosen: sizes.Sizes | None = None, rounds_weights: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Out in q's dtype and the final state in float32; linear in T, no state in HBM."""
    if q_BTHK.size == 0:
        return jnp.zeros_like(v_BTHV, dtype=q_BTHK.dtype), state_BHKV
    size = sizes.choose(chosen).forward
    operands = _operands(q_BTHK, k_BTHK, v_BTHV)
    plan = _plan(operands[0], v_BTHV, segment_ids_BT, size, is_reversed=False, interpret=interpret)
    out_BTHV, final_BHVK = walk.call(
        plan, functools.partial(_attend_chunk, rounds_weights=rounds_weights), operands,
        [operands[2]], log_decay_H, state_BHKV.swapaxes(2, 3), segment_ids_BT,
        name="lightning_attention_forward", interpret=interpret,
    )  # fmt: skip
    return out_BTHV.astype(q_BTHK.dtype), final_BHVK.swapaxes(2, 3)


def backward(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT, dout_BTHV, dfinal_BHKV,
    *, interpret: Any = False, chosen: sizes.Sizes | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of q, k, v and the initial state; two passes, states recomputed in VMEM."""
    if q_BTHK.size == 0:
        return *map(jnp.zeros_like, (q_BTHK, k_BTHK, v_BTHV)), dfinal_BHKV
    # dq is the same attention with the roles (q, k, v) played by (dout, v, k).
    dq_BTHK, _ = forward(
        dout_BTHV, v_BTHV, k_BTHK, log_decay_H, state_BHKV.swapaxes(2, 3), segment_ids_BT,
        interpret=interpret, chosen=chosen, rounds_weights=True,
    )  # fmt: skip
    size = sizes.choose(chosen).backward
    operands = _operands(q_BTHK, k_BTHK, v_BTHV, dout_BTHV)
    plan = _plan(operands[0], v_BTHV, segment_ids_BT, size, is_reversed=True, interpret=interpret)
    dk_BTHK, dv_BTHV, dstate_BHVK = walk.call(
        plan, _differentiate_chunk, operands, operands[1:3], log_decay_H,
        dfinal_BHKV.swapaxes(2, 3), segment_ids_BT,
        name="lightning_attention_backward", interpret=interpret,
    )  # fmt: skip
    return (
        dq_BTHK.astype(q_BTHK.dtype),
        dk_BTHK.astype(k_BTHK.dtype),
        dv_BTHV.astype(v_BTHV.dtype),
        dstate_BHVK.swapaxes(2, 3),
    )


def state_forward(
    k_BTHK, v_BTHV, log_decay_H, zeros_BHKV, segment_ids_BT, *, interpret: Any = False
) -> jax.Array:
    """The final state of `forward` from zeros, which two of its four tensors suffice for."""
    return _state_pass(
        _write_chunk, k_BTHK, v_BTHV, log_decay_H, zeros_BHKV, segment_ids_BT,
        is_reversed=False, name="lightning_attention_state", interpret=interpret,
    )  # fmt: skip


def state_backward(
    q_BTHK, dout_BTHV, log_decay_H, zeros_BHKV, segment_ids_BT, *, interpret: Any = False
) -> jax.Array:
    """The gradient of `backward` for the initial state, if that of the final one is zero."""
    return _state_pass(
        _read_chunk, q_BTHK, dout_BTHV, log_decay_H, zeros_BHKV, segment_ids_BT,
        is_reversed=True, name="lightning_attention_state_gradient", interpret=interpret,
    )  # fmt: skip


def _state_pass(
    step, x_BTHK, y_BTHV, log_decay_H, zeros_BHKV, segment_ids_BT, *, is_reversed, name, interpret
):
    if x_BTHK.size == 0:
        return zeros_BHKV
    size = sizes.choose(None).backward if is_reversed else sizes.choose(None).forward
    operands = _operands(x_BTHK, y_BTHV)
    plan = _plan(
        operands[0], y_BTHV, segment_ids_BT, size, is_reversed=is_reversed, interpret=interpret
    )
    (state_BHVK,) = walk.call(
        plan, step, operands, [], log_decay_H, zeros_BHKV.swapaxes(2, 3), segment_ids_BT,
        name=name, interpret=interpret,
    )  # fmt: skip
    return state_BHVK.swapaxes(2, 3)


def why_not(target: str, q, k, v, *_) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if target != "tpu":
        return "Mosaic TPU kernels run on TPUs"
    if q.dtype == jnp.float64:
        return "TPUs have no float64"
    return None
