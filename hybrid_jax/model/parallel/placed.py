"""The model's ops where its arrays live: each on one device's part, and what the parts exchange."""

import jax
import jax.numpy as jnp

import pallas_kernels
from hybrid_jax.model.ffn.router import Choice
from hybrid_jax.model.parallel import experts, lightning, own_experts, softmax
from hybrid_jax.model.parallel.placement import ROWS, Placement
from pallas_kernels import varying
from sharding import Logical

# Up to so many tokens of all devices of the expert axis, decoding gathers them instead of sending
# each to its experts. For a layer of M2 on 8 GPUs and 64 tokens that is two collectives of 0.4 and
# 0.9 MB, not three with buffers of 4 and 7 MB; for 1024 tokens 7 and 14 MB, not 63 and 107.
GATHERED_TOKENS = 1024


def on_parts(placement: Placement | None, local, in_axes: tuple, out_axes: tuple):
    """`local` on each device's part of its arguments; `local` itself without a placement.

    Args:
      local: takes and returns trees of arrays, and needs nothing of other devices.
      in_axes: for each argument what its dims mean, a tuple of `Logical` or None for a dim that is
        whole, or a tree of such tuples; None for an argument that is None.
      out_axes: the same for each result.
    """
    if placement is None:
        return local

    def specs(axes):
        is_axes = lambda x: (
            isinstance(x, tuple) and all(dim is None or isinstance(dim, Logical) for dim in x)
        )
        return jax.tree.map(lambda dims: placement.spec(*dims), axes, is_leaf=is_axes)

    return jax.shard_map(
        local, mesh=placement.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes)
    )


def _run(placement: Placement, local, in_specs, out_specs, *arrays):
    return jax.shard_map(local, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs)(
        *arrays
    )


def _sequence(placement: Placement) -> str | None:
    """The mesh axis that splits time; None if none does."""
    axes = placement.axes_of(Logical.TIME)
    return axes[0] if axes and placement.shape.sizes[axes[0]] > 1 else None


def lightning_attention(
    placement: Placement, q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT
) -> jax.Array:
    """The op's output; with time split, shards exchange states (`parallel.lightning`)."""
    axis = _sequence(placement)

    def local(q, k, v, log_decay, ids):
        if axis is None:
            return pallas_kernels.lightning_attention(q, k, v, log_decay, segment_ids=ids)[0]
        return lightning.lightning_attention(
            q, k, v, log_decay, axis=axis, segment_ids_BT=ids
        )[0]  # fmt: skip

    x = placement.spec(*ROWS, Logical.HEADS, None)
    # Ids of whole rows: shards then need not ask each other where documents end.
    ids = None if segment_ids_BT is None else placement.spec(Logical.BATCH, None)
    specs = (x, x, x, placement.spec(Logical.HEADS), ids)
    return _run(placement, local, specs, x, q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT)


def softmax_attention(placement: Placement, q_BTHK, k_BTGK, v_BTGV, segment_ids_BT) -> jax.Array:
    """The op's output for rows over themselves; with time split, `parallel.softmax`."""
    axis = _sequence(placement)

    def local(q, k, v, ids):
        if axis is None:
            return pallas_kernels.softmax_attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids)
        return softmax.split_softmax_attention(q, k, v, segment_ids=ids, axis=axis)

    q = placement.spec(*ROWS, Logical.HEADS, None)
    kv = placement.spec(*ROWS, Logical.KV_HEADS, None)
    ids = None if segment_ids_BT is None else placement.spec(Logical.BATCH, None)
    return _run(placement, local, (q, kv, kv, ids), q, q_BTHK, k_BTGK, v_BTGV, segment_ids_BT)


def expert_mixture(
    placement: Placement,
    x_BTD,
    choice: Choice,
    gate_up_ED2F,
    down_EFD,
    num_experts: int,
    layer_idx=None,
) -> jax.Array:
    """`ffn.moe.expert_mixture` [B, T, D] of x [B, T, D]; `choice` is of the B * T tokens.

    With `layer_idx` (inference) the weights have a dim of layers before E, which stays whole. Then
    tokens travel to their experts only where many lie on different devices of the expert axis.
    """
    expert = placement.axes_of(Logical.EXPERTS)
    axes = experts.ExpertAxes(expert, placement.axes_of(Logical.FFN) or None)
    differ = _tokens_differ(placement, expert)

    def local(x_BTD, expert_BTA, weight_BTA, gate_up_ED2F, down_EFD, layer_idx):
        x_TD, expert_TA, weight_TA = (
            x.reshape(-1, x.shape[2]) for x in (x_BTD, expert_BTA, weight_BTA)
        )
        choice = Choice(expert_TA, weight_TA)
        if layer_idx is None:
            out_TD, _ = experts.expert_mixture(
                x_TD, choice, gate_up_ED2F, down_EFD, num_experts, axes
            )
            return out_TD.reshape(x_BTD.shape)
        if differ and x_TD.shape[0] * jax.lax.axis_size(axes.expert) > GATHERED_TOKENS:
            # All experts have rows then: one layer cut out is no loss.
            gate_up_ED2F, down_EFD = (
                jax.lax.dynamic_index_in_dim(w, layer_idx, keepdims=False)
                for w in (gate_up_ED2F, down_EFD)
            )
            out_TD, _ = experts.expert_mixture(
                x_TD, choice, gate_up_ED2F, down_EFD, num_experts, axes
            )
        else:
            out_TD = own_experts.expert_mixture(
                *(x_TD, choice, gate_up_ED2F, down_EFD, layer_idx, num_experts, axes),
                gather=differ,
            )
        return out_TD.reshape(x_BTD.shape)

    rows = placement.spec(*ROWS, None)
    layers = () if layer_idx is None else (None,)
    gate_up = placement.spec(*layers, Logical.EXPERTS, None, None, Logical.FFN)
    down = placement.spec(*layers, Logical.EXPERTS, Logical.FFN, None)
    choices = (x.reshape(*x_BTD.shape[:2], -1) for x in choice)
    specs = (rows, rows, rows, gate_up, down, None if layer_idx is None else placement.spec())
    return _run(placement, local, specs, rows, x_BTD, *choices, gate_up_ED2F, down_EFD, layer_idx)


def _tokens_differ(placement: Placement, axes: tuple[str, ...]) -> bool:
    """Whether devices along these mesh axes hold different tokens."""
    split = {axis for logical in ROWS for axis in placement.axes_of(logical)}
    return any(axis in split and placement.shape.sizes[axis] > 1 for axis in axes)


def look_up(placement: Placement, table_WD, tokens_BT) -> jax.Array:
    """Rows of a table whose words are split: each device gives those it has, and the sum is all."""
    words = placement.axes_of(Logical.VOCAB)

    def local(table_WD, tokens_BT):
        table_WD, tokens_BT = varying.alike(table_WD, tokens_BT)
        W = table_WD.shape[0]
        here_BT = tokens_BT - (jax.lax.axis_index(words) * W if words else 0)
        is_here_BT = (here_BT >= 0) & (here_BT < W)
        x_BTD = jnp.where(is_here_BT[:, :, None], table_WD.at[here_BT].get(mode="clip"), 0)
        return jax.lax.psum(x_BTD, words) if words else x_BTD

    rows = placement.spec(*ROWS)
    specs = (placement.spec(Logical.VOCAB, None), rows)
    return _run(placement, local, specs, placement.spec(*ROWS, None), table_WD, tokens_BT)
