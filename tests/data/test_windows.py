"""Windows cover every token pair once, join no documents, and continue exactly."""

import itertools

import numpy as np
import pytest

from hybrid_jax import data
from hybrid_jax.data import store as store_lib

END = 99


def make_store(lengths):
    """Documents whose tokens tell where they stand: 100 * document + index; the last is END."""
    documents = [np.append(100 * (d + 1) + np.arange(n - 1), END) for d, n in enumerate(lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return data.TokenStore(np.concatenate(documents).astype(np.uint16), offsets)


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
    for begin, end in itertools.pairwise(store.offsets):
        ids = store.ids[begin:end].tolist()
        wanted += itertools.pairwise(ids)
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


def test_batches_shuffle_each_epoch_and_continue_from_a_position(windows):
    batches = data.Batches(windows, 2, seed=5)
    first = [next(batches) for _ in range(12)]
    assert batches.position == 12
    epoch = len(windows)
    order = [tuple(row.tolist()) for batch in first for row in batch.tokens_BT]
    assert len(set(order[:epoch])) == epoch
    assert set(order[:epoch]) == set(order[epoch : 2 * epoch])
    assert order[:epoch] != order[epoch : 2 * epoch]

    again = data.Batches(windows, 2, seed=5)
    again.seek(7)
    for old, new in zip(first[7:], again):
        for a, b in zip(old, new):
            np.testing.assert_array_equal(a, b)
    assert next(iter(data.Batches(windows, 2, seed=6))).tokens_BT.tolist() != (
        first[0].tokens_BT.tolist()
    )


def test_the_rows_of_a_batch_do_not_depend_on_who_reads_them(windows):
    whole = data.Batches(windows, 4, seed=1)
    parts = {rows: data.Batches(windows, 4, seed=1, rows=rows) for rows in ((0, 3), (1,))}
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
    batches = data.Batches(windows, batch_size, seed=1)
    batches.seek(10**15)
    assert next(batches).tokens_BT.shape == (batch_size, 16)


def test_evaluation_covers_everything_once_or_a_spread_sample(windows):
    batches = list(data.evaluation_batches(windows, 3))
    assert sum(batch.weights_BT.sum() for batch in batches) == windows.num_pairs
    assert all(batch.tokens_BT.shape == (3, 16) for batch in batches)
    (few,) = data.evaluation_batches(windows, 2, limit=1)
    np.testing.assert_array_equal(few.tokens_BT[1], windows[len(windows) // 2].tokens_BT)


def test_a_store_survives_disk_and_refuses_what_does_not_fit(tmp_path):
    tokenizer = data.train_tokenizer(["abc abd"], 257)
    documents = [data.Document("a", "abc"), data.Document("b", "d")]
    store = store_lib.tokenise(documents, tokenizer)
    assert store.offsets.tolist() == [0, 4, 6]
    assert store.ids[3] == store.ids[5] == tokenizer.end_id
    store.save(tmp_path, "training")
    loaded = data.TokenStore.load(tmp_path, "training")
    assert loaded.fingerprint() == store.fingerprint() != make_store([4, 2]).fingerprint()

    big = data.TokenStore(np.array([1, 2, 3, 700], np.uint16), np.array([0, 2, 4]))
    with pytest.raises(ValueError, match=r"document 1 holds token id 700.*vocab_size=512"):
        big.check_vocabulary(512, "training text")
    for bad in ("{}", "[]"):
        (tmp_path / "training.json").write_text(bad)
        with pytest.raises(ValueError, match=r"must give `tokens` and `documents`.*Delete the dir"):
            data.TokenStore.load(tmp_path, "training")
    (tmp_path / "training.ids.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"training is missing or damaged"):
        data.TokenStore.load(tmp_path, "training")


def test_unigram_entropy_is_in_nats():
    assert data.unigram_entropy(np.array([0, 1, 2, 3])) == pytest.approx(np.log(4))
    assert data.unigram_entropy(np.array([5, 5])) == 0
