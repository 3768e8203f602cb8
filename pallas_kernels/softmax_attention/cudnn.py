"""cuDNN's fused attention, called below its JAX face.

The public function, `jax.nn.dot_product_attention`, takes no segments. The private one below asks
a live GPU for its generation, which a program compiled for another machine does not have (here the
generation is that of the target, see pallas_kernels.target), and with jax 0.10 places packed keys
wrongly where they have fewer heads than the queries. What remains in use of it is how the custom
call is written; this file is the only one that knows.

Packed rows: cuDNN takes segments as a batch of their own, each with a first element and a length.
There may be SEGMENTS a row, and ids may only rise along a row; whether they do is known when the
program runs, and rows that do not go to the XLA implementation then.

Local letters beside the house alphabet: M = places for segments a row (in firsts one more), P = of
all rows, R = tokens of all rows.
"""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as stablehlo
from jax.extend import core
from jax.interpreters import mlir

from pallas_kernels.softmax_attention import xla

_PARAMETERS = inspect.signature(stablehlo._dot_product_attention_fwd_cuda_lowering).parameters
# Segments of a row, on average over the rows of a call. The kernel's statistics are as large as
# queries for each of them, so with 64 heads of 128 in bfloat16 they take what the queries take.
SEGMENTS = 64


def why_not(target, q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B) -> str | None:
    """Why cuDNN cannot serve this call on this target; None if it can."""
    (K, V), (T, S) = (q_BTHK.shape[3], v_BSGV.shape[3]), (q_BTHK.shape[1], k_BSGK.shape[1])
    if target not in ("hopper", "blackwell", "cuda"):
        return "cuDNN runs on NVIDIA GPUs"
    if not _installed():
        return "cuDNN is not installed with JAX: pip install jax[cuda13]"
    if q_BTHK.dtype != jnp.bfloat16:
        return f"cuDNN's attention needs bfloat16, got {q_BTHK.dtype.name}"
    if offset_B is not None or T != S:
        return "cuDNN's causal mask begins at the first key: no q_offset, T = S"
    if K != V or K % 8 or K > 128:
        return f"cuDNN needs heads of one size, a multiple of 8 up to 128, got {K} and {V}"
    if q_segment_BT is not None and target == "cuda":
        return "cuDNN's packed layout needs compute capability 9 or 10"
    if q_segment_BT is not None and q_BTHK.size >= 2**31:
        return f"cuDNN places segments by 32 bits, got queries of {q_BTHK.size} elements"
    return None


def forward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B):
    """Output in q's dtype, and the logsumexp [B, T, H] of each query's scores, or 0 if packed."""
    arrays = (q_BTHK, k_BSGK, v_BSGV)
    if q_segment_BT is None:
        out_BTHV, logsumexp_BHT = _call_forward(*arrays, *_not_packed(q_BTHK))
        return out_BTHV, logsumexp_BHT.swapaxes(1, 2)

    def packed(*arrays):
        out_BTHV, _ = _call_forward(*arrays, *_place(q_segment_BT, *arrays[:2]))
        out_BTHV = _without_padding(out_BTHV, q_segment_BT)
        return out_BTHV, jnp.zeros_like(out_BTHV[..., 0], jnp.float32)

    def other(q_BTHK, k_BSGK, v_BSGV):
        return xla.forward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, None)

    return lax.cond(_fits(q_segment_BT, kv_segment_BS), packed, other, *arrays)


def backward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *results):
    """Gradients of q, k and v; `results` are the forward's and the cotangent of its output."""
    arrays = (q_BTHK, k_BSGK, v_BSGV)
    if q_segment_BT is None:
        out_BTHV, logsumexp_BTH, d_out_BTHV = results
        statistics_BHT = logsumexp_BTH.swapaxes(1, 2)
        return _call_backward(*arrays, *_not_packed(q_BTHK), statistics_BHT, out_BTHV, d_out_BTHV)

    def packed(*args):
        arrays, (_, _, d_out_BTHV) = args[:3], args[3:]
        place = _place(q_segment_BT, *arrays[:2])
        # The forward again, for its statistics: a quarter more time, but as residuals of every
        # layer they would take the memory of SEGMENTS rows.
        out_BTHV, statistics = _call_forward(*arrays, *place)
        gradients = _call_backward(*arrays, *place, statistics, out_BTHV, d_out_BTHV)
        return tuple(_without_padding(x, q_segment_BT) for x in gradients)

    def other(*args):
        return xla.backward(*args[:3], q_segment_BT, kv_segment_BS, None, *args[3:])

    return lax.cond(_fits(q_segment_BT, kv_segment_BS), packed, other, *arrays, *results)


class _Place(NamedTuple):
    """Where the segments lie, as the custom call takes it; M = SEGMENTS, one more for an end."""

    length_BM: jax.Array
    kv_length_BM: jax.Array
    first_BM: jax.Array
    """The first element of each segment in the queries, not the first token."""
    kv_first_BM: jax.Array


def _not_packed(q_BTHK) -> _Place:
    nothing = jnp.zeros(0, q_BTHK.dtype)
    return _Place(nothing, nothing, nothing, nothing)


def _place(segment_BT, q_BTHK, k_BSGK) -> _Place:
    """The segments of all rows in a row, the unused places behind them empty."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    total, places = B * T, B * SEGMENTS
    starts_R = _starts(segment_BT).reshape(-1)
    (first_P,) = jnp.nonzero(starts_R, size=places, fill_value=total)
    first_P = first_P.astype(jnp.int32)
    number_R = jnp.cumsum(starts_R.astype(jnp.int32)) - 1
    tokens_R = (segment_BT.reshape(-1) != 0).astype(jnp.int32)
    length_P = jnp.zeros(places, jnp.int32).at[number_R].add(tokens_R, mode="drop")
    length_BM = length_P.reshape(B, SEGMENTS)
    first_BM = jnp.concatenate([first_P, jnp.full(B, total, jnp.int32)]).reshape(B, SEGMENTS + 1)
    return _Place(length_BM, length_BM, first_BM * (H * K), first_BM * (G * K))


def _starts(segment_BT) -> jax.Array:
    """Which tokens are the first of their segment."""
    before_BT = jnp.pad(segment_BT, ((0, 0), (1, 0)))[:, :-1]
    return (segment_BT != 0) & (segment_BT != before_BT)


def _fits(q_segment_BT, kv_segment_BS) -> jax.Array:
    """Whether keys and queries have the same segments, no more than places, and no id returns."""
    same = jnp.all(q_segment_BT == kv_segment_BS.astype(q_segment_BT.dtype))
    starts_BT = _starts(q_segment_BT)
    highest_BT = lax.cummax(q_segment_BT, axis=1)
    highest_before_BT = jnp.pad(highest_BT, ((0, 0), (1, 0)))[:, :-1]
    rising = jnp.all(~starts_BT | (q_segment_BT > highest_before_BT))
    few = jnp.sum(starts_BT.astype(jnp.int32)) <= q_segment_BT.shape[0] * SEGMENTS
    return same & rising & few & jnp.all(q_segment_BT >= 0)


def _without_padding(x_BTHK, segment_BT):
    """Zeros at padding, which the kernel does not write."""
    return jnp.where((segment_BT != 0)[:, :, None, None], x_BTHK, 0)


@functools.cache
def _installed() -> bool:
    try:
        return stablehlo.check_cudnn_version() > 0
    except RuntimeError:
        return False


def _primitive(name: str, shapes, lowering) -> core.Primitive:
    """JAX's own primitives refuse programs of several meshes, as if they needed their devices."""
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, lowering, platform="cuda")
    return primitive


_forward_p = _primitive(
    "cudnn_attention_forward",
    stablehlo._dot_product_attention_fwd_abstract,
    stablehlo._dot_product_attention_fwd_cuda_lowering,
)
_backward_p = _primitive(
    "cudnn_attention_backward",
    stablehlo._dot_product_attention_bwd_abstract,
    stablehlo._dot_product_attention_bwd_cuda_lowering,
)


# One call after the other under vmap: a batch of packed rows is no larger batch to the kernel.
@jax.custom_batching.sequential_vmap
def _call_forward(q_BTHK, k_BSGK, v_BSGV, *place):
    """Output, and statistics [B, H, T], or [B * SEGMENTS, H, T] if packed."""
    nothing = jnp.zeros(0, q_BTHK.dtype)
    return tuple(
        _forward_p.bind(
            *(q_BTHK, k_BSGK, v_BSGV, nothing, *place, nothing, nothing),
            is_training=True,
            **_options(q_BTHK, place),
        )
    )


@jax.custom_batching.sequential_vmap
def _call_backward(q_BTHK, k_BSGK, v_BSGV, *args):
    *place, statistics, out_BTHV, d_out_BTHV = args
    nothing = jnp.zeros(0, q_BTHK.dtype)
    return tuple(
        _backward_p.bind(
            *(q_BTHK, k_BSGK, v_BSGV, nothing, *place, nothing, nothing),
            *(statistics, out_BTHV, d_out_BTHV),
            **_options(q_BTHK, place),
        )
    )


def _options(q_BTHK, place) -> dict:
    """What both calls take beside arrays: no bias, no dropout, causal."""
    mask = stablehlo.MaskType
    options = dict(
        scale=q_BTHK.shape[3] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask.PADDING_CAUSAL if place[0].ndim == 2 else mask.CAUSAL,
        layout=stablehlo.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
    if "score_mod_jaxpr" in _PARAMETERS:  # since jax 0.11 or 0.12
        options |= dict(score_mod_name=None, score_mod_jaxpr=None)
    return options
