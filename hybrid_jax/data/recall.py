"""Made-up sequences that ask for what was said before: associative recall, and needles in filler.

The lower half of the vocabulary are keys (0 is none), the upper half values. Every row is made from
its seed and its number alone, so that any batch can be made anywhere, again and again. The first
task is that of Zoology (arXiv 2312.04927) without its power law: there, as here, a model
must find what followed a key, and keep all pairs until then.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Questions(NamedTuple):
    """Rows of tokens, some of which ask for an earlier one; arrays of equal shape [B, T]."""

    tokens_BT: np.ndarray
    """int32 inputs."""
    targets_BT: np.ndarray
    """int32 answers; 0 where nothing is asked."""
    weights_BT: np.ndarray
    """float32, 1 where something is asked."""
    distance_BT: np.ndarray
    """int32 tokens back to the answer; 0 where nothing is asked."""


def associative_recall(
    seed: int, num_pairs_B: Sequence[int], length: int, vocab_size: int, first_row: int = 0
) -> Questions:
    """Pairs of a key and its value, then keys again, whose value is to be predicted.

    Row b has `num_pairs_B[b]` pairs of distinct keys and distinct values. All its other tokens are
    questions: the keys in a random order, and again in another. Answers are not shown, so each
    question goes back to the pair. Rows are numbered from `first_row`.

    Raises ValueError if keys or room do not suffice.
    """
    rows = [
        _recall_row(np.random.default_rng([seed, 0xA55, first_row + b]), n, length, vocab_size)
        for b, n in enumerate(num_pairs_B)
    ]
    return _stack(rows)


def needles(
    seed: int,
    depths_B: Sequence[Sequence[float]],
    length: int,
    vocab_size: int,
    value_length: int = 1,
    first_row: int = 0,
) -> Questions:
    """Keys with a value of `value_length` tokens among filler; at the end all are asked for.

    Row b has one needle for each of its depths in [0, 1]: 0 is the beginning of the filler, 1 its
    end. Filler are keys that belong to no needle. Questions come in a random order, each a key and
    then its value, which is to be predicted token by token.

    Raises ValueError if keys or room do not suffice.
    """
    rows = [
        _needle_row(
            np.random.default_rng([seed, 0x4EED, first_row + b]),
            np.asarray(depths, np.float64), length, vocab_size, value_length,
        )
        for b, depths in enumerate(depths_B)
    ]  # fmt: skip
    return _stack(rows)


def _recall_row(rng, num_pairs: int, length: int, vocab_size: int):
    _check(num_pairs, "pairs", 2 * num_pairs + 1, length, vocab_size)
    keys_N = _draw(rng, 1, vocab_size // 2, num_pairs)
    values_N = _draw(rng, vocab_size // 2, vocab_size, num_pairs)
    num_asked = length - 2 * num_pairs
    rounds = -(-num_asked // num_pairs)
    asked_T = np.concatenate([rng.permutation(num_pairs) for _ in range(rounds)])[:num_asked]
    tokens_T = np.concatenate([np.stack([keys_N, values_N], axis=1).reshape(-1), keys_N[asked_T]])
    blank_T = np.zeros(2 * num_pairs, np.int64)
    targets_T = np.concatenate([blank_T, values_N[asked_T]])
    place_T = np.arange(2 * num_pairs, length)
    distance_T = np.concatenate([blank_T, place_T - (2 * asked_T + 1)])
    return tokens_T, targets_T, distance_T


def _needle_row(rng, depths, length: int, vocab_size: int, value_length: int):
    num, size = len(depths), 1 + value_length
    # The last token of the last answer is no input.
    asked = num * size - 1
    num_filler = length - num * size - asked
    _check(num, "needles", length - num_filler, length, vocab_size)
    if depths.min(initial=0.0) < 0 or depths.max(initial=0.0) > 1:
        raise ValueError(f"Depths of needles must be in [0, 1]; got {depths.tolist()}.")
    keys_N = _draw(rng, 1, vocab_size // 2, num)
    values_NV = rng.integers(vocab_size // 2, vocab_size, (num, value_length))
    needles_NV = np.concatenate([keys_N[:, None], values_NV], axis=1)
    free = np.setdiff1d(np.arange(1, vocab_size // 2), keys_N)
    filler_T = rng.choice(free, num_filler)
    # Where each needle stands among the filler; equal places keep the order of `depths`.
    before_N = np.rint(depths * num_filler).astype(np.int64)
    order_N = np.argsort(before_N, kind="stable")
    where_N = np.repeat(before_N[order_N], size)
    hay_T = np.insert(filler_T, where_N, needles_NV[order_N].reshape(-1))
    begin_N = np.empty(num, np.int64)
    begin_N[order_N] = before_N[order_N] + size * np.arange(num)
    asked_N = rng.permutation(num)
    end_T = needles_NV[asked_N].reshape(-1)
    tokens_T = np.concatenate([hay_T, end_T[:-1]])
    targets_T = np.concatenate([np.zeros(len(hay_T), np.int64), end_T[1:]])
    answer_T = (begin_N[asked_N][:, None] + np.arange(1, size + 1)).reshape(-1)[:asked]
    place_T = np.arange(len(hay_T), length)
    is_value_T = np.arange(1, asked + 1) % size != 0
    targets_T[len(hay_T) :] *= is_value_T
    distance_T = np.concatenate([np.zeros(len(hay_T), np.int64), (place_T - answer_T) * is_value_T])
    return tokens_T, targets_T, distance_T


def _draw(rng, low: int, high: int, count: int) -> np.ndarray:
    """Distinct ids in [low, high)."""
    return low + rng.choice(high - low, count, replace=False)


def _check(count: int, what: str, needed: int, length: int, vocab_size: int) -> None:
    # One key must be left as filler, and as many values as keys.
    most = vocab_size // 2 - 2
    if not 1 <= count <= most:
        raise ValueError(
            f"A vocabulary of {vocab_size} has room for 1 to {most} {what}; got {count}. Ask for "
            "fewer, or take a model with a larger vocabulary."
        )
    if needed > length:
        raise ValueError(
            f"{count} {what} need a length of at least {needed} tokens; got {length}. Ask for "
            "fewer, or for a longer row."
        )


def _stack(rows) -> Questions:
    tokens_BT, targets_BT, distance_BT = (
        np.stack(column).astype(np.int32) for column in zip(*rows, strict=True)
    )
    return Questions(tokens_BT, targets_BT, (distance_BT > 0).astype(np.float32), distance_BT)
