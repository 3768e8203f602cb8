"""The routed mixture when tokens and experts are split over devices; inside `jax.shard_map`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.model import remat
from hybrid_jax.model.ffn import dispatch, router
from hybrid_jax.model.parallel.admission import DROPLESS, Capacity, ExpertAxes, admit
from pallas_kernels import grouped_swiglu, varying
from sharding import exchange


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceLoad:
    """What became of the tokens of this device; sums over devices are those of all tokens."""

    chosen_E: jax.Array
    """int32: how many of their choices fell on each expert."""
    dropped_E: jax.Array
    """int32: how many of these found no place."""
    arrived: jax.Array
    """int32 scalar: rows this device's experts took from everywhere. The largest over the devices,
    against the mean, is what an uneven router costs."""

    def total(self, axes: tuple[str, ...]) -> router.Load:
        """Of all devices along the mesh axes that split tokens; inside `jax.shard_map`."""
        rows = self.arrived.astype(jnp.float32)
        return router.Load(
            dropped_E=lax.psum(self.dropped_E, axes).astype(jnp.float32),
            rows_max=lax.pmax(rows, axes),
            rows_mean=lax.pmean(rows, axes),
        )


def expert_mixture(
    x_TD,
    choice: router.Choice,
    gate_up_ED2F,
    down_EFD,
    num_experts: int,
    axes: ExpertAxes,
    capacity: Capacity = DROPLESS,
    *,
    token_groups: int = 1,
    group_offset=None,
    platform: str | None = None,
) -> tuple[jax.Array, DeviceLoad]:
    """This device's part of `ffn.moe.expert_mixture`: out_TD in float32, and the load.

    A dropped choice adds nothing to its token; the weights of the others stay as they are.

    Args:
      x_TD: this device's tokens, as many on every device.
      choice: of these tokens, among all experts; no token chooses an expert twice. The index
        `num_experts` is no expert: such a choice (of padding) goes nowhere and takes no place.
      gate_up_ED2F: this device's experts, and with `axes.tensor` its part of F; or `[E, D, 2F]`.
      down_EFD: as gate_up.
      token_groups: cut the tokens into so many parts, one exchange each, so that the compiler may
        exchange one part while another is multiplied. TPUs do so where a program is compiled with
        `xla_tpu_enable_async_ragged_all_to_all`. Each part adds to the weights' gradients.
      group_offset: where this layer's experts of this device start, if the stacks hold more.
      platform: as `exchange.exchange_rows` has it.

    Raises:
      ValueError: the experts do not divide over the devices, or not as the weights have them; or
        the tokens not into groups.

    Source: the global router is that of the MiniMax-01 report (arXiv 2501.08313).
    """
    _check(x_TD, gate_up_ED2F, down_EFD, num_experts, axes, token_groups, group_offset)
    # Here, not where they meet: gradients are summed over mesh axes once a token, not once a row.
    x_TD, weight_TA, gate_up_ED2F, down_EFD = varying.alike(
        x_TD, choice.weight_TA, gate_up_ED2F, down_EFD
    )
    gate_up_EDX = gate_up_ED2F.astype(x_TD.dtype).reshape(*gate_up_ED2F.shape[:2], -1)
    down_EFD = down_EFD.astype(x_TD.dtype)
    multiply = functools.partial(
        grouped_swiglu, gate_up_EDX=gate_up_EDX, down_EFD=down_EFD, group_offset=group_offset
    )
    parts = [jnp.split(array, token_groups) for array in (x_TD, weight_TA, choice.expert_TA)]
    orders = [dispatch.expert_order(expert_TA, num_experts) for expert_TA in parts[2]]
    counts_NE = jnp.stack([counts_E for _, _, counts_E in orders])
    num_rows, counts_PNE, kept_PNE = admit(counts_NE, parts[2][0].shape, axes, capacity)
    routes = [exchange.expert_routes(counts_PNE[:, n], kept_PNE[:, n]) for n in range(token_groups)]
    all_stay = lax.axis_size(axes.expert) == 1 and capacity == DROPLESS
    move = functools.partial(exchange.exchange_rows, axis=axes.expert, platform=platform)
    visit = functools.partial(_visit, num_rows, axes.expert, multiply, None if all_stay else move)
    outs, arrived = zip(*map(visit, parts[0], parts[1], orders, routes))
    out_TD = jnp.concatenate(outs)
    if axes.tensor is not None:
        out_TD = lax.psum(out_TD, axes.tensor)
    kept_NE = kept_PNE[lax.axis_index(axes.expert)]
    chosen_E, dropped_E = (jnp.sum(array, axis=0) for array in (counts_NE, counts_NE - kept_NE))
    return out_TD, DeviceLoad(chosen_E, dropped_E, jnp.sum(jnp.stack(arrived)))


def _visit(num_rows: int, axis, multiply, move, x_TD, weight_TA, order, routes: exchange.Routes):
    """(weighted sums over the experts for one group of tokens, rows that came to this device)."""
    token_R, row_TA, _ = order
    # By sender and expert of this device.
    sizes_E = jnp.sum(routes.rows_PPJ[:, lax.axis_index(axis)], axis=0)
    x_RD = dispatch.to_rows(x_TD, token_R, row_TA)
    if move is None:
        # All experts are here and take everything: rows are where they belong.
        y_RD = multiply(x_RD, group_sizes_E=sizes_E)
    else:
        there_RD = checkpoint_name(move(x_RD, routes, num_rows), remat.ARRIVED)
        y_there_RD = multiply(there_RD, group_sizes_E=sizes_E)
        y_RD = move(y_there_RD, routes.back(), x_RD.shape[0])
    y_RD = checkpoint_name(y_RD, remat.RETURNED)
    return dispatch.combine(y_RD, weight_TA, token_R, row_TA), jnp.sum(sizes_E)


def _check(x, gate_up, down, num_experts: int, axes: ExpertAxes, token_groups: int, offset) -> None:
    devices = lax.axis_size(axes.expert)
    here = num_experts // devices
    if num_experts % devices:
        raise ValueError(
            f"expert_mixture splits {num_experts} experts over the {devices} devices of axis "
            f"{axes.expert!r}, which does not come out even; choose a mesh whose expert axis "
            f"divides {num_experts}"
        )
    if token_groups < 1 or x.shape[0] % token_groups:
        raise ValueError(
            f"expert_mixture cuts {x.shape[0]} tokens of a device into {token_groups} groups, "
            f"which does not come out even; choose token_groups that divides {x.shape[0]}"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.shape[0] < here or (offset is None and weight.shape[0] != here):
            raise ValueError(
                f"expert_mixture needs {name} of the {here} experts of a device ({num_experts} "
                f"experts over {devices} devices), got shape {weight.shape}; split dim 0 over "
                f"{axes.expert!r} in in_specs"
            )
