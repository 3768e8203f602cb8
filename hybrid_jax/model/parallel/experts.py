"""The routed mixture when tokens and experts are split over devices; inside `jax.shard_map`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.model.ffn import dispatch, router
from pallas_kernels import grouped_swiglu, varying
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
    `per_expert`, the rows of earlier devices are kept, and of one device those of lower experts."""

    def __post_init__(self):
        for name, factor in dataclasses.asdict(self).items():
            if factor is not None and not (0 < factor < math.inf):
                raise ValueError(
                    f"Capacity.{name} is a multiple of the even share and must be positive and "
                    f"finite, got {factor}; give None for no limit"
                )


DROPLESS = Capacity()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """What became of the tokens of this device; sums over devices are those of all tokens."""

    chosen_E: jax.Array
    """int32: how many of their choices fell on each expert."""
    dropped_E: jax.Array
    """int32: how many of these found no place."""
    arrived: jax.Array
    """int32 scalar: rows this device's experts took from everywhere. The largest over the devices,
    against the mean, is what an uneven router costs."""


def expert_mixture(
    x_TD,
    choice: router.Choice,
    gate_up_ED2F,
    down_EFD,
    num_experts: int,
    axes: ExpertAxes,
    capacity: Capacity = DROPLESS,
    group_offset=None,
) -> tuple[jax.Array, Load]:
    """This device's part of `ffn.moe.expert_mixture`: out_TD in float32, and the load.

    A dropped choice adds nothing to its token; the weights of the others stay as they are.

    Args:
      x_TD: this device's tokens, as many on every device.
      choice: of these tokens, among all experts; no token chooses an expert twice. The index
        `num_experts` is no expert: such a choice (of padding) goes nowhere and takes no place.
      gate_up_ED2F: this device's experts, and with `axes.tensor` its part of F.
      down_EFD: as gate_up.
      group_offset: where this layer's experts of this device start, if the stacks hold more.

    Raises:
      ValueError: the experts do not divide over the devices, or not as the weights have them.

    Source: the global router is that of the MiniMax-01 report (arXiv 2501.08313).
    """
    _check(gate_up_ED2F, down_EFD, num_experts, axes, group_offset)
    F = down_EFD.shape[1]
    # Here, not where they meet: so gradients are summed over mesh axes once a token, not once a
    # row, and those of weights before they are rounded.
    x_TD, weight_TA, gate_up_ED2F, down_EFD = varying.alike(
        x_TD, choice.weight_TA, gate_up_ED2F, down_EFD
    )
    token_R, row_TA, counts_E = dispatch.expert_order(choice.expert_TA, num_experts)
    num_rows, counts_PE, kept_PE = _admit(counts_E, row_TA.shape, axes, capacity)
    routes = exchange.expert_routes(counts_PE, kept_PE)
    me = lax.axis_index(axes.expert)
    # Rows by sender and expert of this device.
    sizes_E = jnp.sum(routes.rows_PPJ[:, me], axis=0)

    x_RD = dispatch.to_rows(x_TD, token_R, row_TA)
    there_RD = exchange.exchange_rows(x_RD, routes, num_rows, axes.expert)
    gate_up = gate_up_ED2F.astype(x_TD.dtype).reshape(*gate_up_ED2F.shape[:2], 2 * F)
    down = down_EFD.astype(x_TD.dtype)
    y_there_RD = grouped_swiglu(there_RD, gate_up, down, sizes_E, group_offset=group_offset)
    y_RD = exchange.exchange_rows(y_there_RD, routes.back(), x_RD.shape[0], axes.expert)
    out_TD = dispatch.combine(y_RD, weight_TA, token_R, row_TA)
    if axes.tensor is not None:
        # Of sums over A, in float32: fewer and finer than the rows.
        out_TD = lax.psum(out_TD, axes.tensor)
    load = Load(counts_E, counts_E - kept_PE[me], jnp.sum(sizes_E))
    return out_TD, load


def _admit(counts_E, choices: tuple[int, int], axes: ExpertAxes, capacity: Capacity):
    """(rows of a device's buffer, rows of each expert at each device [P, E], how many may come)."""
    T, A = choices
    E, P = counts_E.shape[0], lax.axis_size(axes.expert)
    # A device is sent a token once for each of its experts at most.
    num_rows = P * T * min(A, E // P)
    expert_axes = (axes.expert,) if isinstance(axes.expert, str) else axes.expert
    if capacity.per_expert is None:
        counts_PE = kept_PE = lax.all_gather(counts_E, expert_axes)
    else:
        # The global router: what waits for an expert anywhere is known before anything is sent.
        counts_QE = lax.all_gather(counts_E, (*axes.replicas, *expert_axes))
        limit = math.ceil(capacity.per_expert * counts_QE.shape[0] * T * A / E)
        num_rows = min(num_rows, E // P * limit)
        replica = lax.axis_index(axes.replicas) if axes.replicas else 0
        counts_PE, kept_PE = (
            array_QE.reshape(-1, P, E)[replica]
            for array_QE in (counts_QE, _first(counts_QE, limit))
        )
    if capacity.per_device is not None:
        num_rows = min(num_rows, math.ceil(capacity.per_device * T * A))
    # Without limits this changes nothing, unless a token chose an expert twice: then too many rows
    # are dropped and counted instead of written over others.
    waiting_XP = kept_PE.reshape(P, P, E // P).transpose(0, 2, 1).reshape(E, P)
    kept_XP = _first(waiting_XP, num_rows)
    return num_rows, counts_PE, kept_XP.reshape(P, E // P, P).transpose(0, 2, 1).reshape(P, E)


def _first(waiting_QE, limit: int):
    """How many of those that wait in each row find a place, when earlier rows go first."""
    before_QE = jnp.cumsum(waiting_QE, axis=0) - waiting_QE
    return jnp.clip(limit - before_QE, 0, waiting_QE)


def _check(gate_up, down, num_experts: int, axes: ExpertAxes, group_offset) -> None:
    devices = lax.axis_size(axes.expert)
    here = num_experts // devices
    if num_experts % devices:
        raise ValueError(
            f"expert_mixture splits {num_experts} experts over the {devices} devices of axis "
            f"{axes.expert!r}, which does not come out even; choose a mesh whose expert axis "
            f"divides {num_experts}"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.shape[0] < here or (group_offset is None and weight.shape[0] != here):
            raise ValueError(
                f"expert_mixture needs {name} of the {here} experts of a device ({num_experts} "
                f"experts over {devices} devices), got shape {weight.shape}; split dim 0 over "
                f"{axes.expert!r} in in_specs"
            )
