"""What experts on many devices took and dropped arrives in the metrics, counted once."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from hybrid_jax.data import Batch
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.model.parallel.admission import Capacity
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step
from tests.training import small

FACTOR = 0.75


def test_an_update_says_what_was_dropped_and_how_uneven_devices_were():
    options = placements.ExpertOptions(Capacity(per_expert=FACTOR))
    place = placements.make("data=2,expert=2,sequence=2", "long_context", experts=options)
    model = small.small_model()
    # Two equal layers: one body to compile.
    pattern = (dataclasses.replace(model.pattern[0], count=2),)
    model = dataclasses.replace(model, pattern=pattern)
    config = small.small_run(model=model, batch_size=8, accumulate=2)
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    batch = small.random_batch(8, 16)
    state = initial_state(config, skeleton, optimizer, place)

    @jax.jit
    def routing(params, batch: Batch):
        model = skeleton.model(params)
        return model.hidden(batch.tokens_BT, batch.segment_ids_BT, placement=place).routing

    # The two rounds of an update, one row after the other in turn.
    parts = [jax.tree.map(lambda x: x[first::2], batch) for first in range(2)]  # noqa: B023
    rounds = [jax.device_get(routing(state.params, part)) for part in parts]
    spec = config.model.layers[0].ffn
    choices = spec.router.experts_per_token * 4 * 16
    limit = math.ceil(FACTOR * choices / spec.num_experts)
    for found in rounds:
        # Padding chooses nothing, and every expert takes up to its limit whoever sends.
        assert found.hits_E.sum() == 2 * found.tokens.sum()
        np.testing.assert_array_equal(found.load.dropped_E, np.maximum(found.hits_E - limit, 0))
        rows_L = (found.hits_E - found.load.dropped_E).sum(axis=1)
        np.testing.assert_allclose(found.load.rows_mean, rows_L / 8)
        # The two halves of the experts, at four devices each.
        halves = (found.hits_E - found.load.dropped_E).reshape(-1, 2, 2).sum(axis=2)
        assert (found.load.rows_max >= halves.max(axis=1) / 4).all()
    assert sum(found.tokens[0] for found in rounds) == 8 * 16 - 5

    step = make_train_step(config, skeleton, optimizer, place)
    placed = jax.device_put(batch, place.sharding(*placements.ROWS))
    _, metrics = step(state, placed)
    dropped, hits = (
        sum(array.sum() for array in arrays)
        for arrays in zip(*((found.load.dropped_E, found.hits_E) for found in rounds))
    )
    assert metrics["expert_dropped_fraction"] == pytest.approx(dropped / hits, rel=1e-6)
    worst, mean = (
        sum(arrays)
        for arrays in zip(*((found.load.rows_max, found.load.rows_mean) for found in rounds))
    )
    assert metrics["expert_rows_max"] == pytest.approx((worst / mean).max(), rel=1e-6)
    assert metrics["expert_rows_max"] > 1
