"""Lightning attention of rows, heads and (later) times that are split over devices."""

import jax

from hybrid_jax.model.parallel.placement import ROWS, Placement
from pallas_kernels import lightning_attention as on_one_device
from sharding import Logical


def lightning_attention(
    placement: Placement | None, q_BTHK, k_BTHK, v_BTHV, log_decay_H, *, segment_ids_BT=None
):
    """The op's output and final state; see `pallas_kernels.lightning_attention`."""
    if placement is None:
        return on_one_device(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids=segment_ids_BT)
    heads = (Logical.HEADS, None)
    x, state = placement.spec(*ROWS, *heads), placement.spec(Logical.BATCH, *heads, None)
    ids = None if segment_ids_BT is None else placement.spec(*ROWS)

    def local(q, k, v, log_decay, ids):
        return on_one_device(q, k, v, log_decay, segment_ids=ids)

    return jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(x, x, x, placement.spec(Logical.HEADS), ids),
        out_specs=(x, state),
    )(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT)
