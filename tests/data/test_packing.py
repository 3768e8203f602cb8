"""However documents share rows, every pair is there once, and no pair joins two documents."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hybrid_jax import data
from hybrid_jax.config.data import Aligned, Concatenate, FirstFit
from tests.data.test_windows import make_store

LENGTHS = [5, 1, 23, 2, 8, 40, 16, 17, 18, 33]


def pairs_of(windows):
    """Every (token, target) that carries weight, and where it stands in its document."""
    found = []
    for row in windows:
        real = row.weights_BT > 0
        found += zip(row.tokens_BT[real].tolist(), row.targets_BT[real].tolist())
    return sorted(found)


@pytest.mark.parametrize("packing", [FirstFit(), Aligned(multiple=4), Concatenate()])
@hypothesis.given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda x: max(x) > 1),
    seed=st.integers(0, 9),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_pair_is_there_once_whatever_the_packing(packing, lengths, seed):
    store = make_store(lengths)
    windows = data.WindowIndex(store, 16, seed, packing)
    wanted = pairs_of(data.WindowIndex(store, 1000, None))
    assert pairs_of(windows) == wanted
    assert windows.num_pairs == len(wanted)
    for row in windows:
        numbers = row.segment_ids_BT
        # Segments in order from 1, padding behind them all.
        real = numbers[numbers > 0]
        assert np.all(np.diff(real) >= 0) and np.all(numbers[len(real) :] == 0)
        for segment in np.unique(real):
            inside = numbers == segment
            np.testing.assert_array_equal(row.positions_BT[inside], np.arange(inside.sum()))


def test_documents_that_fit_a_row_stay_whole_by_first_fit():
    store = make_store(LENGTHS)
    windows = data.WindowIndex(store, 16, 1, FirstFit())
    segments = sum(len(set(row.segment_ids_BT[row.segment_ids_BT > 0])) for row in windows)
    # 23, 40, 18 and 33 tokens are 22, 39, 17 and 32 pairs: 2, 3, 2 and 2 pieces; 1 token is none.
    assert segments == 5 + 2 + 3 + 2 + 2
    assert len(windows) == -(-windows.num_pairs // 16)


def test_first_fit_is_what_its_name_says():
    # By hand: 9, 7, 6, 5, 4, 3 pairs into rows of 12: {9, 3}, {7, 5}, {6, 4}.
    windows = data.WindowIndex(make_store([4, 8, 10, 6, 5, 7]), 12, None, FirstFit())
    rows = [sorted(np.bincount(row.segment_ids_BT)[1:].tolist()) for row in windows]
    assert rows == [[3, 9], [5, 7], [4, 6]]
    assert windows.efficiency == pytest.approx(34 / 36)


def test_aligned_documents_begin_at_multiples():
    windows = data.WindowIndex(make_store(LENGTHS), 16, 2, Aligned(multiple=8))
    for row in windows:
        begins = np.flatnonzero(np.diff(row.segment_ids_BT, prepend=0) > 0)
        assert np.all(begins % 8 == 0)
    padded = sum(-(-(length - 1) // 8) * 8 for length in LENGTHS)
    assert len(windows) == -(-padded // 16)
    assert windows.efficiency < data.WindowIndex(make_store(LENGTHS), 16, 2).efficiency


def test_masks_go_with_their_targets_through_every_packing():
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, 9, 30, 14])
    ids = np.arange(53)
    learned = rng.random(53) < 0.5
    for packing in (Concatenate(), FirstFit(), Aligned(multiple=4)):
        store = data.TokenStore.of(ids.astype(np.uint16), offsets, learned)
        windows = data.WindowIndex(store, 12, 0, packing, source=3)
        targets = np.concatenate([row.targets_BT[row.weights_BT > 0] for row in windows])
        firsts = offsets[:-1]
        wanted = [n for n in range(53) if learned[n] and n not in firsts]
        assert sorted(targets.tolist()) == wanted
        assert all((row.sources_BT == 3).all() for row in windows)
