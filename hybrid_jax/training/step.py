"""One update: gradients of the loss over a batch, accumulated over rounds, then the optimiser."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from hybrid_jax.config import training as config_lib
from hybrid_jax.data import Batch
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.targets.options import compiler_options
from hybrid_jax.training import balance, breakdown, guard
from hybrid_jax.training.loss import cross_entropy
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Named, Skeleton
from hybrid_jax.training.state import TrainState, shardings

Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """What weighs targets by how likely they are, as policy gradients do; hashable."""

    def given(self, batch) -> tuple[Any, ...]:
        """What it needs of each token of the batch beside its weight, [B, T] each."""

    def __call__(self, logprob_BT, weights_BT, *given_BT) -> jax.Array:
        """The weight of each token's negative log-likelihood, without a gradient of its own."""


def make_train_step(
    config: config_lib.TrainConfig,
    skeleton: Skeleton,
    optimizer: Optimizer,
    placement: Placement | None = None,
    objective: Objective | None = None,
    num_sources: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A compiled update (state, batch of B rows[, limits]) -> (state, metrics).

    The old state is given up. If the loss or the gradient is not a number, or above the
    `guard.Limits`, parameters and optimiser keep every bit; the step counts all the same, and
    `skipped` is 1.

    With `config.accumulate` = n the rows go through the model in n rounds, more as the batch grows.
    Every token weighs the same whichever round it falls in, so the cross-entropy's gradient is that
    of the whole batch; the balance loss, which is no sum over tokens, is the mean of the rounds' by
    their tokens.
    With a `placement` the state lives where `state.shardings` says, and so do the gradients. An
    `objective` weighs the targets otherwise than by the batch's weights alone; it says how.
    `num_sources` are told apart where the batch names its sources.
    """
    live = None if placement is None else shardings(skeleton, optimizer, placement)

    def train_step(state: TrainState, batch: Batch, limits: guard.Limits = guard.NO_LIMITS):
        learns, others = optimizer.split(state.params)

        def loss(learns, part, share):
            total, metrics, nll_BT = _loss(
                config, skeleton, placement, objective, others | learns, part, share
            )
            return total, metrics | breakdown.sums(part, nll_BT, num_sources)

        # Of a batch that has grown, more rounds: the memory of one stays what it is. Fewer rows
        # than a round has are one round.
        rounds = max(1, batch.tokens_BT.shape[0] // config.rows_per_round)
        gradients, metrics = _accumulated(loss, learns, batch, rounds)
        if live is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, optimizer.split(live.params)[0])
        state, found = _applied(optimizer, state, gradients, metrics["loss"], limits)
        return state, metrics | found

    if placement is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        train_step,
        donate_argnums=0,
        # Every process reads the metrics: whole on each device, lists too.
        out_shardings=(live, placement.sharding()),
        compiler_options=compiler_options(placement.mesh.devices.flat[0]),
    )


def make_evaluation_step(
    config: config_lib.TrainConfig, skeleton: Skeleton, placement: Placement | None = None
) -> Callable[[Named, Batch], tuple[jax.Array, jax.Array]]:
    """A compiled (params, batch) -> (sum of nats, sum of weights) over the batch's targets."""

    def evaluation_step(params: Named, batch: Batch):
        sums, _ = _cross_entropy(config, skeleton, placement, None, params, batch, z_loss=0.0)
        return jnp.sum(batch.weights_BT * sums.nll_BT), jnp.sum(batch.weights_BT)

    return jax.jit(evaluation_step)


def _applied(
    optimizer: Optimizer, state: TrainState, gradients: Named, loss, limits: guard.Limits
) -> tuple[TrainState, Metrics]:
    """The state after the update, unchanged but for its count if that is not sound; norms."""
    old = state.params, state.optimizer
    *new, norm = optimizer.update(state.params, gradients, state.optimizer, state.step)
    sound = guard.is_sound(loss, norm, limits)
    params, optimizer_state = guard.choose(sound, tuple(new), old)
    # Of what learns: to read the rest would take its time.
    before, after = (optimizer.split(each)[0] for each in (state.params, params))
    # As it is stored: bfloat16 swallows small updates.
    moved = {k: after[k].astype(jnp.float32) - before[k].astype(jnp.float32) for k in after}
    metrics = {
        "learning_rate": optimizer.learning_rate(state.step),
        "gradient_norm": norm,
        "update_norm": _norm(moved),
        "parameter_norm": _norm(after),
        "skipped": 1 - sound.astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def _norm(named: Named) -> jax.Array:
    squares = [jnp.sum(jnp.square(array.astype(jnp.float32))) for array in named.values()]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def _cross_entropy(
    config, skeleton, placement, objective: Objective | None, params: Named, batch, z_loss: float
):
    """The loss of the targets of (part of) a batch, and the routers' statistics."""
    model = skeleton.model(params)
    hidden = model.hidden(
        batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, placement=placement
    )
    sums = cross_entropy(
        hidden.x_BTD,
        model.head_kernel(),
        batch.targets_BT,
        batch.weights_BT,
        *(() if objective is None else objective.given(batch)),
        reweigh=objective,
        z_loss=z_loss,
        chunk_tokens=config.loss.chunk_tokens,
        placement=placement,
    )
    return sums, hidden.routing


def _loss(
    config, skeleton, placement, objective, params: Named, batch: Batch, share
) -> tuple[jax.Array, Metrics, jax.Array]:
    """What is minimised over (part of) a batch, sums for the metrics, and the nll of each token.

    `share` is the number of tokens in the whole batch: what the sums are divided by.
    """
    z_loss = config.loss.z_loss
    sums, routing = _cross_entropy(config, skeleton, placement, objective, params, batch, z_loss)
    nll = jnp.sum(batch.weights_BT * sums.nll_BT)
    metrics = {"loss": nll / share, "tokens": jnp.sum(batch.weights_BT)}
    total = sums.total / share
    if routing is not None:
        round_share = jnp.sum(batch.weights_BT) / share
        balanced = balance.balance_loss(config.loss.balance, routing) * round_share
        router_z = balance.router_z_loss(routing) * round_share
        total = total + balanced + config.loss.router_z_loss * router_z
        metrics |= {"balance_loss": balanced, "router_z": router_z}
        metrics["expert_hits"] = routing.hits_E
        if (load := routing.load) is not None:
            metrics |= {
                "expert_dropped": jnp.sum(load.dropped_E),
                "expert_rows_max": load.rows_max,
                "expert_rows_mean": load.rows_mean,
            }
    return total, metrics, sums.nll_BT


def _accumulated(loss, params: Named, batch: Batch, rounds: int) -> tuple[Named, Metrics]:
    """(gradients in float32, metrics) of the whole batch, `rounds` parts one after the other."""
    tokens = jnp.maximum(jnp.sum(batch.weights_BT), 1.0)
    gradient = jax.grad(loss, has_aux=True)
    if rounds == 1:
        gradients, metrics = gradient(params, batch, tokens)
        return gradients, _finish(metrics)
    # Rows are dealt out in turn, so that each round holds rows of every shard of the batch.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, rounds, *x.shape[1:]), 1, 0), batch)

    def add(totals, part):
        gradients, metrics = gradient(params, part, tokens)
        found = jax.tree.map(lambda x: x.astype(jnp.float32), (gradients, metrics))
        return jax.tree.map(jnp.add, totals, found), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda part: gradient(params, part, tokens), first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (gradients, metrics), _ = jax.lax.scan(add, zeros, parts)
    return gradients, _finish(metrics)


def _finish(metrics: Metrics) -> Metrics:
    """Means by group, and loads of the experts as the extremes over layers, an even load being 1.

    With a placement also that of the busiest device, relative to the mean: a layer takes so many
    times longer than an even one. Of several rounds the sums count, for they come one after the
    other.
    """
    metrics = breakdown.means(metrics)
    hits_LE = metrics.pop("expert_hits", None)
    if hits_LE is None:
        return metrics
    load_LE = hits_LE / jnp.maximum(jnp.mean(hits_LE, axis=-1, keepdims=True), 1e-9)
    metrics |= {
        "expert_load_max": jnp.max(load_LE),
        "expert_load_min": jnp.min(load_LE),
        "expert_load_entropy": balance.load_entropy(hits_LE),
    }
    if "expert_dropped" in metrics:
        dropped, mean_L = metrics.pop("expert_dropped"), metrics.pop("expert_rows_mean")
        metrics |= {
            "expert_dropped_fraction": dropped / jnp.maximum(jnp.sum(hits_LE), 1.0),
            "expert_rows_max": jnp.max(metrics["expert_rows_max"] / jnp.maximum(mean_L, 1e-9)),
        }
    return metrics
