"""The loss by source and by position is what a count by hand gives, in rounds and on a mesh too."""

import json

import jax
import numpy as np
import pytest

from hybrid_jax import observe
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training import breakdown
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step
from tests.training import small

SOURCES = 3


def batch():
    """Four rows of 160: positions below and above 128, sources 0 and 2, weights that differ."""
    found = small.random_batch(4, 160)
    rng = np.random.default_rng(1)
    # One row is one document, so that its positions pass 128.
    time = np.arange(160, dtype=np.int32)
    found.segment_ids_BT[1], found.positions_BT[1] = 1, time
    found.weights_BT[1] = rng.uniform(size=160)
    return found._replace(sources_BT=2 * rng.integers(0, 2, (4, 160)).astype(np.int32))


def test_sums_are_those_of_a_count_by_hand():
    rows, nll_BT = batch(), np.random.default_rng(2).uniform(size=(4, 160)).astype(np.float32)
    found = breakdown.means(breakdown.sums(rows, nll_BT, SOURCES))
    for source in (0, 2):
        of = rows.sources_BT == source
        weights = rows.weights_BT[of].astype(np.float64)
        expected = (weights * nll_BT[of]).sum() / weights.sum()
        # Sums of 320 float32 numbers.
        np.testing.assert_allclose(found["loss_by_source"][source], expected, rtol=1e-5)
        np.testing.assert_allclose(found["tokens_by_source"][source], weights.sum(), rtol=1e-5)
    assert np.isnan(found["loss_by_source"][1]) and found["tokens_by_source"][1] == 0
    early = rows.positions_BT < 128
    for at, of in enumerate((early, ~early)):
        weights = rows.weights_BT[of].astype(np.float64)
        expected = (weights * nll_BT[of]).sum() / weights.sum()
        np.testing.assert_allclose(found["loss_by_position"][at], expected, rtol=1e-5)
    without = breakdown.means(breakdown.sums(rows._replace(sources_BT=None), nll_BT, SOURCES))
    assert set(without) == {"loss_by_position"}


@pytest.mark.parametrize(
    ("length", "buckets"), [(1, 1), (128, 1), (129, 2), (256, 2), (257, 3), (1 << 20, 14)]
)
def test_buckets_begin_at_powers_of_two(length, buckets):
    assert breakdown.num_buckets(length) == buckets
    at = np.array([[*range(0, length, max(1, length // 500)), length - 1]], np.int32)
    padded = np.zeros((1, length), np.int32)
    padded[0, : at.size] = at[0, :length]
    found = np.array(breakdown.position_buckets(padded))[0, : at.size]
    expected = [0 if p < 128 else int(np.log2(p // 128)) + 1 for p in padded[0, : at.size]]
    assert found.tolist() == expected and max(found) == buckets - 1


def test_rounds_and_devices_give_the_means_of_the_whole_batch():
    def metrics(rounds, placement=None):
        config = small.small_run(model=small.dense_model(), accumulate=rounds)
        skeleton = Skeleton(config.model)
        optimizer = Optimizer(config, skeleton.axes)
        state = initial_state(config, skeleton, optimizer, placement)
        step = make_train_step(config, skeleton, optimizer, placement, num_sources=SOURCES)
        rows = batch()
        if placement is not None:
            rows = jax.device_put(rows, placement.sharding(*placements.ROWS))
        return jax.device_get(step(state, rows)[1])

    whole = metrics(1)
    assert np.isfinite(whole["loss_by_source"]).tolist() == [True, False, True]
    # Tokens of words that are split come together with those of other devices.
    mesh = placements.make("expert=2,sequence=4", "long_context")
    # Both at once: a program less to compile.
    other = metrics(2, mesh)
    for name in ("loss_by_source", "tokens_by_source", "loss_by_position"):
        np.testing.assert_allclose(other[name], whole[name], rtol=1e-5, err_msg=name)
    by_source = np.nansum(whole["loss_by_source"] * whole["tokens_by_source"])
    np.testing.assert_allclose(by_source / whole["tokens"], whole["loss"], rtol=1e-5)


def test_a_group_without_tokens_is_null_in_the_metrics(tmp_path):
    with observe.MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append({"step": 1, "loss_by_source": [1.5, float("nan")]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss_by_source"] == [1.5, None]
