"""The loss by source and by position: sums over tokens, which rounds and devices add up."""

import jax
import jax.numpy as jnp

FIRST_POSITIONS = 128
"""Positions in the first bucket; every other one begins at so many times a power of two."""


def sums(batch, nll_BT: jax.Array, num_sources: int) -> dict[str, jax.Array]:
    """Weighted nats and weights, float32: [P] by bucket of positions and [S] by source.

    The last only where the batch names its sources, which must be below `num_sources`.
    """
    nats_BT = batch.weights_BT * nll_BT
    buckets_BT = position_buckets(batch.positions_BT)
    P = num_buckets(batch.positions_BT.shape[1])
    found = {
        "position_nats": _by_group(buckets_BT, nats_BT, P),
        "position_tokens": _by_group(buckets_BT, batch.weights_BT, P),
    }
    if batch.sources_BT is not None:
        found |= {
            "source_nats": _by_group(batch.sources_BT, nats_BT, num_sources),
            "source_tokens": _by_group(batch.sources_BT, batch.weights_BT, num_sources),
        }
    return found


def means(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics with means in place of `sums`: loss_by_position [P], and where sources are named
    loss_by_source and tokens_by_source [S]. NaN where there is no token.
    """
    metrics = dict(metrics)
    for group in ("position", "source"):
        if f"{group}_nats" in metrics:
            nats, tokens = metrics.pop(f"{group}_nats"), metrics.pop(f"{group}_tokens")
            metrics[f"loss_by_{group}"] = nats / tokens
            if group == "source":
                metrics["tokens_by_source"] = tokens
    return metrics


def num_buckets(length: int) -> int:
    """Buckets that the positions of a row of `length` tokens fall into: 0-127, 128-255, 256-511."""
    return 1 + max(0, (length - 1) // FIRST_POSITIONS).bit_length()


def position_buckets(positions_BT) -> jax.Array:
    """The bucket of each position, int32."""
    P = num_buckets(positions_BT.shape[1])
    starts = [FIRST_POSITIONS << power for power in range(P - 1)]
    return sum((jnp.int32(positions_BT >= start) for start in starts), jnp.zeros_like(positions_BT))


def _by_group(group_BT, value_BT, count: int) -> jax.Array:
    # One masked sum a group: a scatter-add would take tokens to one device, one after the other.
    is_of_GBT = group_BT[None] == jnp.arange(count, dtype=jnp.int32)[:, None, None]
    return jnp.sum(jnp.where(is_of_GBT, value_BT[None], 0.0), axis=(1, 2))
