"""The op for one layer of weights that lie in one array for all layers, as inference holds them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels import target, varying
from pallas_kernels.grouped_matmul.mosaic_gpu import LEAST_ROWS
from pallas_kernels.grouped_swiglu import pallas_tpu_narrow, xla
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.grouped_swiglu.pallas_tpu_narrow import Weight


class Narrow(NamedTuple):
    """What to make of weights that are trees of arrays: values in eight bits and scales, say."""

    widen: Callable[[Any, Any], jax.Array]
    """(a part cut out of all arrays of a weight, dtype) -> one array."""
    apart: Callable[[Any], tuple[jax.Array, jax.Array, Any]] | None = None
    """weight -> (values, scales, dtype of the values) as `pallas_tpu_narrow.Weight` has them, for
    kernels that widen by themselves; None for what is not of this kind."""


def _cast(w, dtype):
    return w.astype(dtype)


def grouped_swiglu_of_layer(
    x_RD: jax.Array,
    gate_up_LED2F: Any,
    down_LEFD: Any,
    group_sizes_E: jax.Array,
    layer_idx: jax.Array,
    *,
    narrow: Narrow | None = None,
) -> jax.Array:
    """`grouped_swiglu` with the weights of layer `layer_idx`, in x's dtype: out_RD. No gradient.

    Where the implementation can, only matrices of groups with rows are read. On TPU one layer of
    weights that are arrays is cut out first: [2, F] and [2F] lie differently there, and a program
    that joins the two dims of all layers holds the weights twice.

    Args:
      narrow: None for weights that are arrays. Otherwise each is a tree of arrays with dims L and
        E. On TPUs kernels read eight bits and widen a block at a time, where they can serve the
        call. Elsewhere one matrix is widened at a time, just before it is multiplied, where few
        rows make a kernel for many pointless; else the matrices of one layer.
    """
    arrays = varying.alike(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx)
    if narrow is None:
        special: dict[str, Callable] = {"tpu": cut_out, "cpu": in_place}
        elsewhere: Callable = in_place
    else:
        one_layer = functools.partial(cut_out, widen=narrow.widen)
        one_matrix = functools.partial(one_by_one, widen=narrow.widen)
        is_much = x_RD.shape[0] >= LEAST_ROWS * group_sizes_E.shape[0]
        elsewhere = one_layer if is_much else one_matrix
        special = {"tpu": _on_tpu(narrow, *arrays), "cpu": one_matrix}
    branches = {place: special.get(place, elsewhere) for place in target.TARGETS}
    return target.select(branches, *arrays)


def _on_tpu(narrow: Narrow, x_RD, gate_up, down, *_) -> Callable:
    """The kernels that take narrow weights as they lie, or what serves where they cannot."""
    apart = narrow.apart
    fallback = functools.partial(cut_out_narrow, widen=narrow.widen)
    if apart is None:
        return fallback
    weights = Weight(*apart(gate_up)), Weight(*apart(down))
    if pallas_tpu_narrow.why_not(x_RD, *weights) is not None:
        return fallback

    def kernels(x_RD, gate_up, down, group_sizes_E, layer_idx):
        weights = Weight(*apart(gate_up)), Weight(*apart(down))
        return pallas_tpu_narrow.grouped_swiglu(x_RD, *weights, group_sizes_E, layer_idx)

    return kernels


def in_place(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx) -> jax.Array:
    """The matrices of all layers as one list of groups."""
    E = gate_up_LED2F.shape[1]
    gate_up, down = (
        w.astype(x_RD.dtype).reshape(-1, *w.shape[2:]) for w in (gate_up_LED2F, down_LEFD)
    )
    return grouped_swiglu(x_RD, _joined(gate_up), down, group_sizes_E, group_offset=layer_idx * E)


def one_by_one(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx, *, widen) -> jax.Array:
    """The same, each matrix widened as its group is reached."""
    both = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), (gate_up_LED2F, down_LEFD))
    gate_up, down = both
    offset = layer_idx * group_sizes_E.shape[0]
    return xla.grouped_swiglu(x_RD, gate_up, down, group_sizes_E, offset, widen)


def cut_out(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx, *, widen=_cast) -> jax.Array:
    """The matrices of one layer."""

    def one(w):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer_idx, keepdims=False), w)
        return widen(part, x_RD.dtype)

    return grouped_swiglu(x_RD, _joined(one(gate_up_LED2F)), one(down_LEFD), group_sizes_E)


def cut_out_narrow(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx, *, widen) -> jax.Array:
    """As `cut_out`, of weights in eight bits on TPUs whose kernels cannot take them.

    The compiler takes [D, 2, F] of bytes as [2, D, F] there, since two rows of bytes fill half a
    tile: cut out otherwise, all layers are laid out anew with that padding. Joined after it is
    widened, a layer would be there in float32 too.
    """

    def one(w, is_gate_up):
        # What has fewer dims (a scale a matrix, say) is joined as it is.
        parts = is_gate_up and w.ndim == 5
        w = w.swapaxes(2, 3) if parts else w
        part = jax.lax.dynamic_index_in_dim(w, layer_idx, keepdims=False)
        return _joined(part.swapaxes(1, 2)) if parts else part

    gate_up = jax.tree.map(lambda w: one(w, True), gate_up_LED2F)
    down = jax.tree.map(lambda w: one(w, False), down_LEFD)
    gate_up, down = (widen(w, x_RD.dtype) for w in jax.lax.optimization_barrier((gate_up, down)))
    return grouped_swiglu(x_RD, gate_up, down, group_sizes_E)


def _joined(gate_up_ED2F):
    return gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)
