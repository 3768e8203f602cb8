"""The rate at chosen steps of every schedule."""

import numpy as np
import pytest

from hybrid_jax.config import training as t
from hybrid_jax.training.schedule import learning_rate


def rates(decay, steps=101, warmup=10, peak=2.0):
    config = t.Schedule(peak=peak, warmup_steps=warmup, decay=decay)
    return np.array(learning_rate(config, steps, np.arange(steps)))


@pytest.mark.parametrize(
    ("decay", "middle", "last"),
    [
        (t.Constant(), 2.0, 2.0),
        (t.Cosine(final_fraction=0.1), 1.1, 0.2),
        (t.Linear(final_fraction=0.5), 1.5, 1.0),
        (t.ExponentialTail(tail_fraction=0.2, final_fraction=0.15), 2.0, 0.3),
    ],
)
def test_warm_up_peak_middle_and_end(decay, middle, last):
    rate = rates(decay)
    np.testing.assert_allclose(rate[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rate[10], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate[[55, 100]], [middle, last], rtol=1e-5)
    assert np.all(np.diff(rate[10:]) <= 1e-6)


def test_the_tail_falls_exponentially():
    rate = rates(t.ExponentialTail(tail_fraction=0.2, final_fraction=0.25), steps=111)
    np.testing.assert_allclose(rate[[90, 100]], [2.0, 1.0], rtol=1e-5)


def test_no_warm_up_and_a_run_of_one_step():
    np.testing.assert_allclose(rates(t.Cosine(), warmup=0)[0], 2.0)
    assert np.all(np.isfinite(rates(t.Linear(), steps=1, warmup=0)))


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match=r"Schedule.peak must be > 0; got -1"):
        t.Schedule(peak=-1.0)
    with pytest.raises(ValueError, match=r"Cosine.final_fraction must be in \[0, 1\); got 2"):
        t.Cosine(final_fraction=2.0)
