"""Which rows the experts take: all, or those that a capacity shared by all devices has room for."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.model import remat
from sharding import exchange


@dataclasses.dataclass(frozen=True)
class ExpertAxes:
    """Mesh axes a mixture is split over; of several for one purpose the major one comes first."""

    expert: exchange.Axis = "expert"
    """Splits the experts, and the tokens."""
    tensor: exchange.Axis | None = None
    """Splits F of every expert (ETP). All its devices hold the same tokens."""
    replicas: tuple[str, ...] = ()
    """Split the tokens but not the experts (EDP), and share the capacity: the global router."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How many rows are taken, as a multiple of an even share; what is beyond is dropped.

    None is no limit: the buffers then hold the worst case, and nothing is dropped.
    """

    per_expert: float | None = None
    """Of an expert, over the tokens of all `ExpertAxes.expert` and `ExpertAxes.replicas`. Its
    earlier tokens are kept: tokens are numbered by replica, then device, then place there."""
    per_device: float | None = None
    """Of a device, over the tokens of its `ExpertAxes.expert`; this bounds its memory. After
    `per_expert`, the rows of earlier devices are kept, and of one device those of lower experts;
    in each token group by itself."""

    def __post_init__(self):
        for name, factor in dataclasses.asdict(self).items():
            if factor is not None and not (0 < factor < math.inf):
                raise ValueError(
                    f"Capacity.{name} is a multiple of the even share and must be positive and "
                    f"finite, got {factor}; give None for no limit"
                )


DROPLESS = Capacity()


class Admitted(NamedTuple):
    """What every device of the expert axis knows before a row is sent."""

    num_rows: int
    """Rows that a device's buffer must hold for one group of tokens."""
    counts_PNE: jax.Array
    """int32: rows of each group for each expert at each device."""
    kept_PNE: jax.Array
    """int32: how many of these may come, the first ones."""


def admit(
    counts_NE: jax.Array, choices: tuple[int, ...], axes: ExpertAxes, capacity: Capacity
) -> Admitted:
    """What is taken of the rows that wait here and everywhere; inside `jax.shard_map`.

    Args:
      counts_NE: int32, this device's rows of each group of tokens for each expert.
      choices: shape [T, A] of a group's choices, the same on every device.
    """
    N, E = counts_NE.shape
    T, A = choices
    P = lax.axis_size(axes.expert)
    J = E // P
    # A device is sent a token once for each of its experts at most.
    num_rows = P * T * min(A, J)
    expert_axes = (axes.expert,) if isinstance(axes.expert, str) else axes.expert
    if capacity.per_expert is None:
        counts_PNE = kept_PNE = _gather(counts_NE, expert_axes)
    else:
        # The global router: what waits for an expert anywhere is known before anything is sent.
        counts_QNE = _gather(counts_NE, (*axes.replicas, *expert_axes))
        limit = math.ceil(capacity.per_expert * counts_QNE.shape[0] * N * T * A / E)
        num_rows = min(num_rows, J * limit)
        kept_QNE = _first(counts_QNE.reshape(-1, E), limit)
        replica = lax.axis_index(axes.replicas) if axes.replicas else 0
        counts_PNE, kept_PNE = (
            array.reshape(-1, P, N, E)[replica] for array in (counts_QNE, kept_QNE)
        )
    if capacity.per_device is not None:
        num_rows = min(num_rows, math.ceil(capacity.per_device * T * A))
    # Without limits this changes nothing, unless a token chose an expert twice: then too many rows
    # are dropped and counted instead of written over others. By sender, then its experts there.
    waiting_PJX = kept_PNE.reshape(P, N, P, J).transpose(0, 3, 1, 2).reshape(P * J, N * P)
    kept_PJX = _first(waiting_PJX, num_rows).reshape(P, J, N, P)
    return Admitted(num_rows, counts_PNE, kept_PJX.transpose(0, 2, 3, 1).reshape(P, N, E))


def _gather(counts_NE, axes: tuple[str, ...]):
    return checkpoint_name(lax.all_gather(counts_NE, axes), remat.COUNTS)


def _first(waiting_QE, limit: int):
    """How many of those that wait in each row find a place, when earlier rows go first."""
    before_QE = jnp.cumsum(waiting_QE, axis=0) - waiting_QE
    return jnp.clip(limit - before_QE, 0, waiting_QE)
