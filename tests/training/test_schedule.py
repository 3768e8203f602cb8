"""The rate at chosen steps of every schedule."""

import numpy as np
import pytest

from hybrid_jax.config import training as t
from hybrid_jax.training.schedule import learning_rate
from tests.training import small


def rates(decay, steps=101, warmup=10, peak=2.0, **changes):
    schedule = t.Schedule(peak=peak, warmup_steps=warmup, decay=decay)
    config = small.small_run(schedule=schedule, steps=steps, **changes)
    return np.array(learning_rate(config, np.arange(steps)))


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


def test_phases_follow_the_tokens_while_the_batch_grows():
    phases = t.Phases(
        phases=(
            t.Phase(share=2, start=1.0),
            t.Phase(share=1, start=0.5),
            t.Phase(share=1, start=0.5, end=0.125, shape="exponential"),
        )
    )
    even = rates(phases, steps=101, warmup=0)
    np.testing.assert_allclose(even[[0, 49, 50, 74, 75]], [2, 2, 1, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(even[[88, 100]], [2 * 0.5 * 0.25**0.52, 0.25], rtol=1e-5)
    # 50 steps of 4 rows of 32 tokens, then of 8: two thirds of the tokens are in the second half.
    ramp = (t.Ramp(tokens=50 * 4 * 32, batch_size=8),)
    grown = rates(phases, steps=101, warmup=0, batch_ramp=ramp)
    np.testing.assert_allclose(grown[[62, 63]], [2, 1], rtol=1e-5)
    np.testing.assert_allclose(grown[100], 0.25, rtol=1e-5)


def test_the_other_shapes_go_from_start_to_end():
    for shape, middle in (("linear", 0.6), ("cosine", 0.6)):
        one = t.Phases(phases=(t.Phase(share=1, start=1.0, end=0.2, shape=shape),))
        np.testing.assert_allclose(
            rates(one, warmup=0)[[0, 50, 100]], [2.0, 2 * middle, 0.4], rtol=1e-5
        )


def test_no_warm_up_and_a_run_of_one_step():
    np.testing.assert_allclose(rates(t.Cosine(), warmup=0)[0], 2.0)
    assert np.all(np.isfinite(rates(t.Linear(), steps=1, warmup=0)))


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match=r"Schedule.peak must be > 0; got -1"):
        t.Schedule(peak=-1.0)
    with pytest.raises(ValueError, match=r"Phase.end belongs to every shape but constant"):
        t.Phase(share=1, start=1.0, shape="linear")
    with pytest.raises(
        ValueError, match=r"batch_ramp\[0\].batch_size=6 must be a multiple of the 4"
    ):
        small.small_run(batch_ramp=(t.Ramp(tokens=9, batch_size=6),))
    with pytest.raises(ValueError, match=r"Cosine.final_fraction must be in \[0, 1\); got 2"):
        t.Cosine(final_fraction=2.0)
