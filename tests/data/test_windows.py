"""Windows cover every token pair once, join no documents, and continue exactly."""

import itertools

import numpy as np
import pytest

from hybrid_jax import data
from hybrid_jax.config.data import Source

END = 99


def make_store(lengths):
    """Documents whose tokens tell where they stand: 100 * document + index; the last is END."""
    documents = [np.append(100 * (d + 1) + np.arange(n - 1), END) for d, n in enumerate(lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return data.TokenStore.of(np.concatenate(documents).astype(np.uint16), offsets)


LENGTHS = [5, 1, 23, 2, 8, 40]


@pytest.fixture
def windows():
    return data.WindowIndex(make_store(LENGTHS), 16, seed=3)


def test_every_pair_of_neighbours_appears_once(windows):
    pairs = []
    for row in windows:
        real = row.weights_BT > 0
        pairs += zip(row.tokens_BT[real].tolist(), row.targets_BT[real].tolist())
    wanted = []
    store = make_store(LENGTHS)
    for number, length in enumerate(store.lengths):
        wanted += itertools.pairwise(store.read(number, 0, int(length))[0].tolist())
    assert sorted(pairs) == sorted(wanted)
    assert windows.num_pairs == len(wanted) == len(windows.all_targets())


def test_segments_restart_at_each_document_and_only_the_end_is_padded(windows):
    rows = list(windows)
    for row in rows:
        real = row.segment_ids_BT > 0
        assert row.segment_ids_BT[0] == 1 and row.positions_BT[0] == 0
        np.testing.assert_array_equal(row.weights_BT, real.astype(np.float32))
        document = row.tokens_BT // 100
        change = np.flatnonzero(np.diff(row.segment_ids_BT[real]))
        np.testing.assert_array_equal(change, np.flatnonzero(np.diff(document[real])))
        for segment in np.unique(row.segment_ids_BT[real]):
            inside = row.segment_ids_BT == segment
            np.testing.assert_array_equal(row.positions_BT[inside], np.arange(inside.sum()))
        # A target is the next token of the same document, or its end.
        same = row.targets_BT[real] // 100 == document[real]
        assert np.all(same | (row.targets_BT[real] == END))
    assert all(row.weights_BT.all() for row in rows[:-1])
    assert not rows[-1].weights_BT[-1] and rows[-1].tokens_BT[-1] == 0


def test_data_without_a_pair_is_an_error():
    with pytest.raises(ValueError, match="nothing to predict"):
        data.WindowIndex(make_store([1, 1]), 8)


def make_batches(windows, size, seed, rows=range):
    sources = (Source(path="a"),)
    return data.Batches([windows], sources, lambda step: size, seed=seed, steps=99, rows=rows)


def test_batches_shuffle_each_epoch_and_continue_from_a_position(windows):
    batches = make_batches(windows, 2, 5)
    first = [next(batches) for _ in range(12)]
    assert batches.position["batches"] == 12 and batches.position["taken"] == {"a": 24}
    epoch = len(windows)
    order = [tuple(row.tolist()) for batch in first for row in batch.tokens_BT]
    assert len(set(order[:epoch])) == epoch
    assert set(order[:epoch]) == set(order[epoch : 2 * epoch])
    assert order[:epoch] != order[epoch : 2 * epoch]

    again = make_batches(windows, 2, 5)
    again.seek({"batches": 7, "taken": {"a": 14}, "owed": {"a": 0.0}})
    for old, new in zip(first[7:], again):
        for a, b in zip(old[:5], new[:5], strict=True):
            np.testing.assert_array_equal(a, b)
    assert next(iter(make_batches(windows, 2, 6))).tokens_BT.tolist() != (
        first[0].tokens_BT.tolist()
    )


def test_the_rows_of_a_batch_do_not_depend_on_who_reads_them(windows):
    whole = make_batches(windows, 4, 1)
    parts = {
        rows: make_batches(windows, 4, 1, lambda size, rows=rows: rows) for rows in ((0, 3), (1,))
    }
    for _ in range(5):
        tokens_BT = next(whole).tokens_BT
        for rows, batches in parts.items():
            np.testing.assert_array_equal(next(batches).tokens_BT, tokens_BT[list(rows)])
    wanted = [batch.weights_BT for batch in data.evaluation_batches(windows, 4)]
    for rows in parts:
        found = data.evaluation_batches(windows, 4, rows=rows)
        for weights_BT, batch in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(batch.weights_BT, weights_BT[list(rows)])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_go_on_far_beyond_any_run(windows, batch_size):
    batches = make_batches(windows, batch_size, 1)
    far = 10**15
    batches.seek({"batches": far, "taken": {"a": far * batch_size}, "owed": {"a": 0.0}})
    assert next(batches).tokens_BT.shape == (batch_size, 16)


def test_evaluation_covers_everything_once_or_a_spread_sample(windows):
    batches = list(data.evaluation_batches(windows, 3))
    assert sum(batch.weights_BT.sum() for batch in batches) == windows.num_pairs
    assert all(batch.tokens_BT.shape == (3, 16) for batch in batches)
    (few,) = data.evaluation_batches(windows, 2, limit=1)
    np.testing.assert_array_equal(few.tokens_BT[1], windows[len(windows) // 2].tokens_BT)


def test_a_store_knows_its_data_and_refuses_what_does_not_fit():
    store = make_store(LENGTHS)
    assert store.fingerprint() == make_store(LENGTHS).fingerprint()
    assert store.fingerprint() != make_store(LENGTHS[::-1]).fingerprint()
    assert store.select(5, 23).lengths.tolist() == [5, 23, 8]
    assert store.select(min_tokens=9).fingerprint() != store.fingerprint()
    store.check_vocabulary(700, "text")
    with pytest.raises(ValueError, match=r"text holds token id 638.*vocab_size=512 ends at 511"):
        store.check_vocabulary(512, "text")


def test_unigram_entropy_is_in_nats():
    assert data.unigram_entropy(np.array([0, 1, 2, 3])) == pytest.approx(np.log(4))
    assert data.unigram_entropy(np.array([5, 5])) == 0
