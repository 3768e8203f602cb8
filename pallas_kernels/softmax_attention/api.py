"""The public op: checks its arguments once, then hands them to one implementation."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch, target, varying
from pallas_kernels.softmax_attention import checks, cudnn, reference, splash, xla

# A module's forward and backward take the arrays in the order of the op's arguments, None where
# one is missing; the forward returns the output and the logsumexp [B, T, H], the backward takes
# these and the cotangent after the arrays.
MODULES: dict[str, ModuleType] = {"splash": splash, "cudnn": cudnn, "xla": xla}
AUTOMATIC = ("splash", "cudnn", "xla")
SOFTMAX_RESULTS = "softmax_attention_results"
"""The name of the output and its logsumexp for `jax.checkpoint`: where a policy keeps them, the
gradient does not run the forward again."""
WHY_NOT = {"splash": splash.why_not, "cudnn": cudnn.why_not}


def softmax_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    *,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of grouped query heads: out_BTHV, in q's dtype.

    Query t of row b stands at index q_offset[b] + t and attends to the keys s <= that index, of its
    own segment if segments are given. Query head h reads key-value head h // (H // G). Scores are
    scaled by 1/sqrt(K); scores, softmax and sums are float32. A query of segment 0 (padding), or
    one that sees no key, gives zeros and passes no gradient.

    Args:
      q_BTHK: queries, float32 or bfloat16. Any T and S, also 0 and 1.
      k_BSGK: keys in q's dtype, G dividing H. S may be the capacity of a cache filled in part: work
        stops at the last index any query can see. What lies beyond must be finite.
      v_BSGV: values in q's dtype.
      q_segment_ids: integer [B, T], 0 for padding; given with kv_segment_ids or not at all.
      kv_segment_ids: integer [B, S], 0 for padding.
      q_offset: integer [B], index of the first query in the keys; None for 0.
      implementation: "splash" (JAX's TPU kernel), "cudnn", "xla", "reference", or None for the
        first of them that can serve the call on the target compiled for. `choices` says which.

    Raises:
      ValueError: shapes, dtypes or arguments that do not fit together; the message says which.
      Unsupported: the implementation that was named cannot serve this call.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), for the blockwise form and its gradient.
    """
    checks.check_arrays(q_BTHK, k_BSGK, v_BSGV)
    B, T, H, _ = q_BTHK.shape
    _, S, _, V = v_BSGV.shape
    checks.check_segments(q_segment_ids, kv_segment_ids, (B, T), (B, S))
    checks.check_integers("q_offset", q_offset, (B,))
    if not B * T * H * S * V:
        return jnp.zeros((B, T, H, V), q_BTHK.dtype)
    arrays = varying.alike(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids, q_offset)
    if implementation is None:
        # A single query waits for memory, which XLA reads as fast as a kernel would.
        slow = "xla" if T > 1 else None
        plan = dispatch.plan("softmax_attention", _choose(*arrays), slow=slow)
        return _attention(plan, *arrays)
    return dispatch.call(
        "softmax_attention", IMPLEMENTATIONS, (), *arrays, implementation=implementation
    )


def choices(
    q_BTHK, k_BSGK, v_BSGV, *, q_segment_ids=None, kv_segment_ids=None, q_offset=None
) -> dict[target.Target, dispatch.Choice]:
    """What the automatic choice takes on each target, and why; arrays may be abstract."""
    return _choose(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids, q_offset)


_choose = functools.partial(dispatch.choose, AUTOMATIC, WHY_NOT)


def by_target(plan: dispatch.Plan, function: str, *arrays, **options):
    """`forward` or `backward` of the implementation that is planned for the target compiled for."""
    # One function a name: the targets that share it share its branch.
    functions = {
        name: functools.partial(getattr(MODULES[name], function), **options) for name in plan.names
    }
    branches = {
        where: functions[name] for where, name in zip(target.TARGETS, plan.names, strict=True)
    }
    return varying.of_a_kernel(functools.partial(target.select, branches))(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: dispatch.Plan, *arrays):
    return _forward(plan, *arrays)[0]


def _forward(plan, q_BTHK, *others):
    q_BTHK = target.announce(plan.notes, q_BTHK)
    results = by_target(plan, "forward", q_BTHK, *others)
    out_BTHV, logsumexp_BTH = (checkpoint_name(x, SOFTMAX_RESULTS) for x in results)
    return out_BTHV, (q_BTHK, *others, out_BTHV, logsumexp_BTH)


def _backward(plan, residuals, d_out_BTHV):
    return *by_target(plan, "backward", *residuals, d_out_BTHV), None, None, None


_attention.defvjp(_forward, _backward)


def _named(name: str):
    """The op by one implementation, whatever the target."""

    def attend(*arrays):
        dispatch.demand(WHY_NOT.get(name), *arrays)
        return _attention(dispatch.named(name), *arrays)

    return attend


IMPLEMENTATIONS = {
    **{name: _named(name) for name in MODULES},
    "reference": reference.softmax_attention,
}
