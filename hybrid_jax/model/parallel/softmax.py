"""Softmax attention of rows, heads and (later) times that are split over devices."""

import jax

from hybrid_jax.model.parallel.placement import ROWS, Placement
from pallas_kernels import softmax_attention as on_one_device
from sharding import Logical


def softmax_attention(placement: Placement | None, q_BTHK, k_BTGK, v_BTGV, segment_ids_BT):
    """Causal attention of rows over themselves; see `pallas_kernels.softmax_attention`."""

    def local(q, k, v, ids):
        return on_one_device(q, k, v, q_segment_ids=ids, kv_segment_ids=ids)

    if placement is None:
        return local(q_BTHK, k_BTGK, v_BTGV, segment_ids_BT)
    q, kv = (placement.spec(*ROWS, heads, None) for heads in (Logical.HEADS, Logical.KV_HEADS))
    ids = None if segment_ids_BT is None else placement.spec(*ROWS)
    return jax.shard_map(
        local, mesh=placement.mesh, in_specs=(q, kv, kv, ids), out_specs=q
    )(q_BTHK, k_BTGK, v_BTGV, segment_ids_BT)  # fmt: skip
