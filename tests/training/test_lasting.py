"""A run may last as long as its data, and never asks for more of it than there is."""

import dataclasses

import pytest

from hybrid_jax import data
from hybrid_jax.config import training as t
from hybrid_jax.config.data import Data, Source
from hybrid_jax.training.lasting import with_steps
from tests.data.test_windows import make_store
from tests.training import small


def resolved(epochs, steps, **changes):
    """Steps of a run on two sources of 10 and 7 rows."""
    sources = tuple(
        Source(path=name, max_epochs=most) for name, most in zip("ab", epochs, strict=True)
    )
    config = small.small_run(
        data=Data(sources=sources, sequence_length=8), steps=steps, batch_size=4, **changes
    )
    windows = [data.WindowIndex(make_store([rows * 8 + 1]), 8) for rows in (10, 7)]
    return with_steps(config, windows).steps


def test_steps_come_from_epochs():
    # 20 and 7 rows in batches of 4.
    assert resolved((2.0, 1.0), 0) == 6
    assert resolved((2.0, 1.5), 0) == 7
    assert resolved((2.0, 1.0), 6) == 6
    assert resolved((None, 1.0), 100) == 100


def test_a_growing_batch_takes_its_rows():
    # Three batches of 4, then of 8: 27 rows give 3 + 1.
    ramp = (t.Ramp(tokens=3 * 4 * 8, batch_size=8),)
    assert resolved((2.0, 1.0), 0, batch_ramp=ramp) == 4
    late = (t.Ramp(tokens=100 * 4 * 8, batch_size=8),)
    assert resolved((2.0, 1.0), 0, batch_ramp=late) == 6


def test_what_cannot_be_is_said_before_anything_is_computed():
    with pytest.raises(ValueError, match=r"27 rows in `max_epochs`, which is 6 steps; steps=7"):
        resolved((2.0, 1.0), 7)
    with pytest.raises(ValueError, match=r"steps=0 means .* but b has none. Give --steps N"):
        resolved((2.0, None), 0)
    with pytest.raises(ValueError, match=r"give 3 rows in `max_epochs`, less than a batch of 4"):
        resolved((0.2, 0.2), 0)


def test_a_run_of_one_epoch_ends_by_itself(tmp_path):
    (tmp_path / "text").mkdir()
    config = small.small_run(small.write_text(tmp_path / "text"), steps=0)
    (source,) = config.data.sources
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, sources=(dataclasses.replace(source, max_epochs=0.5),)
        ),
    )
    outcome = small.train(config, tmp_path / "run")
    (windows,) = [
        data.WindowIndex(data.open_dataset(tmp_path / "run" / "tokens" / "00").training, 32)
    ]
    assert outcome.step == len(windows) // 2 // config.batch_size > 1
    again = small.train(
        dataclasses.replace(config, steps=outcome.step), tmp_path / "run", resume=True
    )
    assert again.step == outcome.step
