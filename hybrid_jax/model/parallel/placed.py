"""The model's ops where its arrays live: each on one device's part, and what the parts exchange."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import pallas_kernels
from hybrid_jax.model import quantized
from hybrid_jax.model.ffn.router import Choice, Load
from hybrid_jax.model.parallel import experts, lightning, own_experts, softmax, weights, words
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


def _sequence(placement: Placement) -> tuple[str, ...] | None:
    """The mesh axes that split time; None if none does."""
    sizes = placement.shape.sizes
    return tuple(axis for axis in placement.axes_of(Logical.TIME) if sizes[axis] > 1) or None


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


def choose(placement: Placement, choose, logits_BTE, *whole) -> Choice:
    """`choose(logits_BTE, *whole)` of each token where it is: XLA splits a top-k on TPUs alone."""
    rows = placement.spec(*ROWS, None)
    in_specs = (rows, *(PartitionSpec() for _ in whole))
    return _run(placement, choose, in_specs, rows, logits_BTE, *whole)


def expert_mixture(
    placement: Placement, x_BTD, choice: Choice, gate_up_ED2F, down_EFD, num_experts: int
) -> tuple[jax.Array, Load]:
    """`ffn.moe.expert_mixture` [B, T, D] of x [B, T, D] as `placement.experts` has it.

    `choice` is of [B, T] tokens or of B * T; the index `num_experts` is of none and goes nowhere. A
    capacity is that of the tokens of all devices: those of the mesh axes that split tokens and not
    experts count together. ValueError if rules split experts over an axis that splits no tokens.
    """
    split = placement.axes_of(Logical.EXPERTS)
    if idle := [axis for axis in split if axis not in placement.token_axes]:
        raise ValueError(
            f"The rules {placement.rules.name!r} split experts over {', '.join(idle)}, which "
            "splits no tokens: its devices would all send the same rows. Split the experts' ffn "
            "over it, or batch or time."
        )
    axes = experts.ExpertAxes(
        expert=split,
        tensor=placement.axes_of(Logical.FFN) or None,
        replicas=tuple(axis for axis in placement.token_axes if axis not in split),
    )
    options = placement.experts
    gate_up_axes = Logical.EXPERTS, Logical.MODEL, Logical.PARTS, Logical.FFN
    gate_up = weights.of(placement, gate_up_ED2F.shape, *gate_up_axes)
    down_axes = Logical.EXPERTS, Logical.FFN, Logical.MODEL
    down = weights.of(placement, down_EFD.shape, *down_axes)

    def local(x_BTD, expert_BTA, weight_BTA, gate_up_ED2F, down_EFD):
        x_BTD = placement.row_major(x_BTD)
        x_TD, expert_TA, weight_TA = (
            x.reshape(-1, x.shape[2]) for x in (x_BTD, expert_BTA, weight_BTA)
        )
        # Side by side while it is a part: the whole and its gradient are not laid out anew then.
        gate_up_EDX = gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)
        gate_up_EDX = gate_up.whole(gate_up_EDX, x_BTD.dtype)
        down_EFD = down.whole(down_EFD, x_BTD.dtype)
        out_TD, load = experts.expert_mixture(
            x_TD, Choice(expert_TA, weight_TA), gate_up_EDX, down_EFD, num_experts, axes,
            options.capacity, token_groups=options.token_groups, platform=placement.platform,
        )  # fmt: skip
        out_BTD = placement.row_major(out_TD.reshape(x_BTD.shape))
        return out_BTD, load.total(placement.token_axes)

    rows = placement.spec(*ROWS, None)
    choices = (x.reshape(*x_BTD.shape[:2], -1) for x in choice)
    specs = (rows, rows, rows, gate_up.spec, down.spec)
    out_specs = rows, PartitionSpec()
    return _run(placement, local, specs, out_specs, x_BTD, *choices, gate_up_ED2F, down_EFD)


def stacked_expert_mixture(
    placement: Placement,
    x_BTD,
    choice: Choice,
    gate_up_LED2F,
    down_LEFD,
    layer_idx,
    num_experts: int,
) -> jax.Array:
    """`ffn.moe.expert_mixture` [B, T, D] with one layer of weights that lie in one array: decoding.

    Tokens travel to their experts only where many lie on different devices of the expert axis;
    otherwise every device adds its own experts' part. None is dropped. Weights may be quantised.
    """
    axes = experts.ExpertAxes(
        placement.axes_of(Logical.EXPERTS), placement.axes_of(Logical.FFN) or None
    )
    differ = any(
        axis in placement.token_axes and placement.shape.sizes[axis] > 1 for axis in axes.expert
    )

    def local(x_BTD, expert_BTA, weight_BTA, gate_up_LED2F, down_LEFD, layer_idx):
        x_TD, expert_TA, weight_TA = (
            x.reshape(-1, x.shape[2]) for x in (x_BTD, expert_BTA, weight_BTA)
        )
        choice = Choice(expert_TA, weight_TA)
        if differ and x_TD.shape[0] * jax.lax.axis_size(axes.expert) > GATHERED_TOKENS:
            # All experts have rows then: one layer cut out is no loss.
            gate_up_ED2F, down_EFD = (
                quantized.wide(quantized.one_of(w, layer_idx), x_BTD.dtype)
                for w in (gate_up_LED2F, down_LEFD)
            )
            out_TD, _ = experts.expert_mixture(
                *(x_TD, choice, gate_up_ED2F, down_EFD, num_experts, axes),
                platform=placement.platform,
            )
        else:
            out_TD = own_experts.expert_mixture(
                *(x_TD, choice, gate_up_LED2F, down_LEFD, layer_idx, num_experts, axes),
                gather=differ,
            )
        return out_TD.reshape(x_BTD.shape)

    rows = placement.spec(*ROWS, None)
    gate_up = placement.spec(None, Logical.EXPERTS, None, None, Logical.FFN)
    down = placement.spec(None, Logical.EXPERTS, Logical.FFN, None)
    weights = quantized.split(gate_up_LED2F, gate_up), quantized.split(down_LEFD, down)
    specs = (rows, rows, rows, *weights, PartitionSpec())
    return _run(
        *(placement, local, specs, rows, x_BTD),
        *(choice.expert_TA, choice.weight_TA, gate_up_LED2F, down_LEFD, layer_idx),
    )


def look_up(placement: Placement, table_WD, tokens_BT, dtype) -> jax.Array:
    """Rows of a table whose words are split: each device gives those it has, and the sum is all."""
    table = weights.of(placement, table_WD.shape, Logical.VOCAB, Logical.MODEL)
    split = words.of(table, 0)

    def local(table_WD, tokens_BT):
        table_WD = table.whole(table_WD)
        table_WD, tokens_BT = varying.alike(table_WD, split.bring(tokens_BT))
        W = table_WD.shape[0]
        here_BT = split.here(tokens_BT, W)
        is_here_BT = (here_BT >= 0) & (here_BT < W)
        x_BTD = jnp.where(is_here_BT[:, :, None], table_WD.at[here_BT].get(mode="clip"), 0)
        # One device has a word, so the sum is exact in any dtype.
        return split.add_and_return(x_BTD.astype(dtype))

    rows = placement.spec(*ROWS)
    specs = (table.spec, rows)
    return _run(placement, local, specs, placement.spec(*ROWS, None), table_WD, tokens_BT)
