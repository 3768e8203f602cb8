"""Made-up retrieval tasks: answers stand where they say, and a row depends on its number only."""

import numpy as np
import pytest

from hybrid_jax.data import recall


def test_every_question_goes_back_to_the_value_behind_its_key():
    made = recall.associative_recall(0, [3, 8], 30, 40)
    for b, num_pairs in enumerate((3, 8)):
        tokens, asked = made.tokens_BT[b], made.weights_BT[b] > 0
        np.testing.assert_array_equal(asked, np.arange(30) >= 2 * num_pairs)
        pairs = dict(tokens[: 2 * num_pairs].reshape(-1, 2).tolist())
        assert len(pairs) == len(set(pairs.values())) == num_pairs
        assert all(0 < key < 20 <= value < 40 for key, value in pairs.items())
        for t in np.flatnonzero(asked):
            back = t - made.distance_BT[b, t]
            assert made.targets_BT[b, t] == pairs[tokens[t]] == tokens[back]
            assert tokens[back - 1] == tokens[t]
        first_round = tokens[2 * num_pairs : 3 * num_pairs]
        assert set(first_round.tolist()) == set(pairs)


def test_needles_lie_at_their_depths_and_are_asked_for_at_the_end():
    depths = [(0.0, 1.0, 0.5), (0.5, 0.5, 0.0)]
    made = recall.needles(1, depths, 60, 64, value_length=2)
    num_filler = 60 - 9 - 8
    for b, row_depths in enumerate(depths):
        tokens, targets = made.tokens_BT[b], made.targets_BT[b]
        asked = np.flatnonzero(made.weights_BT[b])
        # key v1 v2 key v1 v2 key v1: of three values of two tokens, six are predicted.
        np.testing.assert_array_equal(asked - 52, [0, 1, 3, 4, 6, 7])
        begins = []
        for t in asked[::2]:
            here = np.flatnonzero(tokens[:t] == tokens[t])
            assert len(here) == 1, "a needle's key occurs once before it is asked for"
            begins.append(int(here[0]))
            value = tokens[here[0] + 1 : here[0] + 3]
            np.testing.assert_array_equal(value, targets[t : t + 2])
            assert tokens[t - made.distance_BT[b, t]] == value[0]
            assert tokens[t + 1 - made.distance_BT[b, t + 1]] == value[1]
        filler_before = [begin - 3 * i for i, begin in enumerate(sorted(begins))]
        wanted = sorted(round(depth * num_filler) for depth in row_depths)
        assert filler_before == wanted
        values = tokens[tokens >= 32]
        assert len(values) == 6 + 5


def test_a_row_depends_on_its_number_only():
    make = recall.associative_recall
    whole = make(7, [4, 4, 6], 40, 64)
    part = make(7, [4, 6], 40, 64, first_row=1)
    for all_rows, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_rows[1:], some)
    assert (make(8, [4], 40, 64).tokens_BT != whole.tokens_BT[0]).any()
    one = recall.needles(7, [(0.3,)], 20, 64, first_row=5)
    six = recall.needles(7, [(0.3,)] * 6, 20, 64)
    np.testing.assert_array_equal(one.tokens_BT[0], six.tokens_BT[5])


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="room for 1 to 30 pairs; got 31"):
        recall.associative_recall(0, [31], 100, 64)
    with pytest.raises(ValueError, match="8 pairs need a length of at least 17 tokens; got 16"):
        recall.associative_recall(0, [8], 16, 64)
    with pytest.raises(ValueError, match="2 needles need a length of at least 7 tokens; got 6"):
        recall.needles(0, [(0.0, 1.0)], 6, 64)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]; got \[1.5\]"):
        recall.needles(0, [(1.5,)], 20, 64)
