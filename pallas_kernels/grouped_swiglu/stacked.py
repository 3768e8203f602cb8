"""The op for one layer of weights that lie in one array for all layers, as inference holds them."""

import jax

from pallas_kernels import target, varying
from pallas_kernels.grouped_swiglu.api import grouped_swiglu


def grouped_swiglu_of_layer(
    x_RD: jax.Array,
    gate_up_LED2F: jax.Array,
    down_LEFD: jax.Array,
    group_sizes_E: jax.Array,
    layer_idx: jax.Array,
) -> jax.Array:
    """`grouped_swiglu` with the weights of layer `layer_idx`, in x's dtype: out_RD. No gradient.

    Where the implementation can, only matrices of groups with rows are read. On TPU one layer is
    cut out first: [2, F] and [2F] lie differently there, and a program that joins the two dims of
    all layers holds the weights twice.
    """
    branches = {place: cut_out if place == "tpu" else in_place for place in target.TARGETS}
    arrays = varying.alike(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx)
    return target.select(branches, *arrays)


def in_place(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx) -> jax.Array:
    """The matrices of all layers as one list of groups."""
    E = gate_up_LED2F.shape[1]
    gate_up, down = (
        w.astype(x_RD.dtype).reshape(-1, *w.shape[2:]) for w in (gate_up_LED2F, down_LEFD)
    )
    return grouped_swiglu(x_RD, _joined(gate_up), down, group_sizes_E, group_offset=layer_idx * E)


def cut_out(x_RD, gate_up_LED2F, down_LEFD, group_sizes_E, layer_idx) -> jax.Array:
    """The matrices of one layer."""
    gate_up, down = (
        jax.lax.dynamic_index_in_dim(w, layer_idx, keepdims=False).astype(x_RD.dtype)
        for w in (gate_up_LED2F, down_LEFD)
    )
    return grouped_swiglu(x_RD, _joined(gate_up), down, group_sizes_E)


def _joined(gate_up_ED2F):
    return gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)
