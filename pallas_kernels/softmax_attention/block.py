"""One block of attention, for callers who hold a row's keys in parts and merge the results.

The same implementations as the op's; their logsumexp, a residual there, is a result here.
"""

import functools

import jax

from pallas_kernels import dispatch, target, varying
from pallas_kernels.softmax_attention import api, checks, splash, tiles

# cuDNN's packed layout keeps its statistics in an order of its own, and no test without a GPU could
# say that those of plain rows are logarithms as ours.
AUTOMATIC = ("splash", "xla")
NO_SCORE = tiles.NO_SCORE


def softmax_attention_block(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    *,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    causal: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to one block of keys: out_BTHV in q's dtype, logsumexp_BTH in float32.

    The results over a set of keys are those over its parts, weighted by exp(logsumexp of the part -
    logsumexp of all). A query that sees no key of the block gives zeros and a logsumexp of
    -1e30 or a little above, which is finite so that merging two of them leaves no NaN.

    JAX cannot differentiate it: see `softmax_attention_block_gradients`.

    Args:
      q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids: as in `softmax_attention`.
      causal: query t sees the keys s <= t; or else every key, as order hides none.
      implementation: "splash", "xla", or None for the first that can serve the call.

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together; the message says which.
      Unsupported: the implementation that was named cannot serve this call.
    """
    arrays = _checked(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids)
    plan = _plan(implementation, causal, *arrays)
    q_BTHK, *others = arrays
    q_BTHK = target.announce(plan.notes, q_BTHK)
    return api.by_target(plan, "forward", q_BTHK, *others, causal=causal)


def softmax_attention_block_gradients(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    out_BTHV: jax.Array,
    logsumexp_BTH: jax.Array,
    d_out_BTHV: jax.Array,
    *,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    causal: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one block of keys adds to dq, and the dk and dv of the block, each in its array's dtype.

    Args:
      out_BTHV, logsumexp_BTH, d_out_BTHV: over all keys of the row, not over the block alone: the
        output, its logsumexp and its cotangent.
      q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids, causal, implementation: as in
        `softmax_attention_block`.
    """
    arrays = _checked(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids)
    plan = _plan(implementation, causal, *arrays)
    results = out_BTHV, logsumexp_BTH, d_out_BTHV
    return api.by_target(plan, "backward", *varying.alike(*arrays, *results), causal=causal)


def choices(*arrays, causal: bool) -> dict[target.Target, dispatch.Choice]:
    """For every target, the implementation of both, and why not the others."""
    return dispatch.choose(AUTOMATIC, _why_not(causal), *arrays)


def _why_not(causal: bool):
    return {"splash": functools.partial(splash.why_not, causal=causal)}


def _checked(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids):
    """The arrays of an implementation, its offset None; empty blocks have no implementation."""
    checks.check_arrays(q_BTHK, k_BSGK, v_BSGV)
    (B, T, H, _), (_, S, _, V) = q_BTHK.shape, v_BSGV.shape
    checks.check_segments(q_segment_ids, kv_segment_ids, (B, T), (B, S))
    if not B * T * H * S * V:
        raise ValueError(
            f"softmax_attention_block needs at least one query and key, got q {q_BTHK.shape} and v "
            f"{v_BSGV.shape}; leave the block out"
        )
    return varying.alike(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids, None)


def _plan(implementation: str | None, causal: bool, *arrays) -> dispatch.Plan:
    if implementation is None:
        chosen = choices(*arrays, causal=causal)
        return dispatch.plan("softmax_attention_block", chosen, slow="xla")
    if implementation not in AUTOMATIC:
        names = ", ".join(repr(name) for name in AUTOMATIC)
        raise ValueError(
            f"softmax_attention_block has no implementation {implementation!r}; choose one of "
            f"{names}, or None for the automatic choice"
        )
    dispatch.demand(_why_not(causal).get(implementation), *arrays)
    return dispatch.named(implementation)
