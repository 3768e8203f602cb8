"""Shares by weight at every moment, weights that change on the way, and exact continuation."""

import json

import numpy as np
import pytest

from hybrid_jax import data
from hybrid_jax.config.data import Data, Source, Weight, parse_sources
from hybrid_jax.data.mixture import Mixture
from tests.data.test_windows import make_store

SOURCES = (
    Source(path="a", weight=0.5),
    Source(path="b", weight=0.3),
    Source(path="c", weight=0.2),
)


def counts(choices, number=3):
    return np.bincount([choice.source for choice in choices], minlength=number)


def test_counts_are_never_a_row_from_the_weights():
    mixture = Mixture(SOURCES, [10, 10, 10])
    taken = np.zeros(3)
    for done in range(1, 500):
        taken += counts(mixture.choose(1, 0.0))
        assert np.all(np.abs(taken - done * np.array([0.5, 0.3, 0.2])) <= 1)


def test_rows_of_a_source_follow_one_another():
    choices = Mixture(SOURCES, [10, 10, 10]).choose(50, 0.0)
    for source in range(3):
        rows = [choice.row for choice in choices if choice.source == source]
        assert rows == list(range(len(rows)))


def test_weights_change_on_a_straight_line():
    points = (Weight(at=0.2, weight=0.0), Weight(at=0.6, weight=3.0))
    sources = (Source(path="a", weight=1.0), Source(path="b", schedule=points))
    weights = [sources[1].weight_at(progress) for progress in (0, 0.2, 0.4, 0.6, 1)]
    assert weights == pytest.approx([0, 0, 1.5, 3, 3])
    mixture = Mixture(sources, [10, 10])
    shares = [counts(mixture.choose(1000, progress), 2)[1] / 1000 for progress in (0.0, 0.4, 0.8)]
    assert shares == pytest.approx([0.0, 0.6, 0.75], abs=2e-3)


def test_a_source_ends_after_its_epochs():
    sources = (Source(path="a", max_epochs=1.5), Source(path="b"))
    choices = Mixture(sources, [10, 10]).choose(100, 0.0)
    assert counts(choices, 2).tolist() == [15, 85]
    only = Mixture((Source(path="a", max_epochs=1),), [10])
    with pytest.raises(ValueError, match=r"No source has anything left to give at 50.0%"):
        only.choose(11, 0.5)


def test_a_stored_state_goes_on_exactly():
    mixture = Mixture(SOURCES, [10, 10, 10])
    mixture.choose(77, 0.1)
    other = Mixture(SOURCES, [10, 10, 10])
    other.restore(json.loads(json.dumps(mixture.state)))
    assert other.choose(99, 0.3) == mixture.choose(99, 0.3)
    with pytest.raises(ValueError, match=r"of the sources \['a', 'b', 'c'\]; here are \['a'\]"):
        Mixture(SOURCES[:1], [10]).restore(mixture.state)


def test_batches_grow_and_go_on_exactly_from_any_of_them():
    def batches(rows=range):
        stores = [make_store([9, 30, 14]), make_store([50, 8])]
        windows = [data.WindowIndex(store, 8, 1, source=n) for n, store in enumerate(stores)]
        size = lambda step: 2 if step < 3 else 6
        sources = (Source(path="a", weight=0.7), Source(path="b", weight=0.3))
        return data.Batches(windows, sources, size, seed=4, steps=10, rows=rows)

    whole = batches()
    made, positions = [], [whole.position]
    for _ in range(8):
        made.append(next(whole))
        positions.append(json.loads(json.dumps(whole.position)))
    assert [len(batch.tokens_BT) for batch in made] == [2] * 3 + [6] * 5
    assert {int(s) for batch in made for s in batch.sources_BT.reshape(-1)} == {0, 1}
    for start in (0, 2, 3, 7):
        again = batches(rows=lambda size: range(1, size, 2))
        again.seek(positions[start])
        for batch in made[start:]:
            found = next(again)
            for mine, wanted in zip(found, batch, strict=True):
                np.testing.assert_array_equal(mine, wanted[1::2])


def test_sources_are_named_once_and_parsed_from_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1").mkdir()
    parsed = parse_sources(["web=0.7", "a=1", "code/part"])
    assert [(s.path, s.weight, s.label) for s in parsed] == [
        ("web", 0.7, "web"),
        ("a=1", 1.0, "a=1"),
        ("code/part", 1.0, "part"),
    ]
    with pytest.raises(ValueError, match=r"'web=lots' must be PATH or PATH=WEIGHT"):
        parse_sources(["web=lots"])
    with pytest.raises(ValueError, match=r"sources hold part more than once; give each its own"):
        Data(sources=(Source(path="a/part"), Source(path="b/part")))
