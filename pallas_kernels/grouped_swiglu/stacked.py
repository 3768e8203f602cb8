"""The op for one layer of weights that lie in one array for all layers, as inference holds them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import target, varying
from pallas_kernels.grouped_matmul.mosaic_gpu import LEAST_ROWS
from pallas_kernels.grouped_swiglu import xla
from pallas_kernels.grouped_swiglu.api import grouped_swiglu


def _cast(w, dtype):
    return w.astype(dtype)


def grouped_swiglu_of_layer(
    x_RD: jax.Array,
    gate_up_LED2F: Any,
    down_LEFD: Any,
    group_sizes_E: jax.Array,
    layer_idx: jax.Array,
    *,
    widen: Callable[[Any, Any], jax.Array] | None = None,
) -> jax.Array:
    """`grouped_swiglu` with the weights of layer `layer_idx`, in x's dtype: out_RD. No gradient.

    Where the implementation can, only matrices of groups with rows are read. On TPU one layer is
    cut out first: [2, F] and [2F] lie differently there, and a program that joins the two dims of
    all layers holds the weights twice.

    Args:
      widen: None for weights that are arrays. Otherwise each is a tree of arrays with dims L and E
        (say, values in eight bits and their scales), and `widen(part, dtype)` makes one array of
        what is cut out of all of them. That is one matrix at a time, just before it is multiplied,
        where few rows make a kernel for many pointless; else the matrices of one layer.
    """
    spread: Callable = in_place
    cut: Callable = cut_out
    elsewhere = spread
    if widen is not None:
        spread = functools.partial(one_by_one, widen=widen)
        cut = functools.partial(cut_out, widen=widen)
        is_much = x_RD.shape[0] >= LEAST_ROWS * group_sizes_E.shape[0]
        elsewhere = cut if is_much else spread
    on_tpu = cut if widen is None else functools.partial(cut_out_narrow, widen=widen)
    special = {"tpu": on_tpu, "cpu": spread}
    branches = {place: special.get(place, elsewhere) for place in target.TARGETS}
    arrays = varying.alike(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx)
    return target.select(branches, *arrays)


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
    """As `cut_out`, of weights in eight bits on TPUs.

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
