"""Loss on text by the length of the context: does a longer one help, and does it go on helping?"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from hybrid_jax.config.data import Source
from hybrid_jax.config.evaluation import Perplexity
from hybrid_jax.data import TokenStore, WindowIndex, encoding
from hybrid_jax.evaluation.buckets import by_power_of_two
from hybrid_jax.evaluation.predictor import Predictor, Tick, silent

# Rows that are held at one time.
_SLAB = 512


def evaluate(
    predictor: Predictor, store: TokenStore, settings: Perplexity, tick: Tick = silent
) -> dict:
    """Mean nats a token of the same tokens at each length, and by position in the longest.

    Windows are those of training (`data.WindowIndex` in the store's order): documents share them
    and never see each other, so at the run's own length, over all held-out text, the loss is the
    run's held-out loss. Every predicted token sees at most `length` tokens of its document.

    Returns {"lengths": [{"length", "nats", "perplexity", "tokens"}], "positions": [{"first",
    "last", "nats", "tokens"}]}; positions count the tokens that the predicted one sees, at the
    longest length. Raises ValueError if no document is as long as the longest length.
    """
    store = chosen(store, settings)
    lengths, positions = [], []
    for length in sorted(settings.lengths):
        seen, nats = _nats(predictor, store, length, tick)
        mean = float(nats.mean())
        lengths.append(
            {
                "length": length,
                "nats": mean,
                "perplexity": math.exp(mean),
                "tokens": len(nats),
            }
        )
        positions = [
            {"first": b.first, "last": b.last, "nats": b.mean, "tokens": b.size}
            for b in by_power_of_two(seen, nats)
        ]
    return {"lengths": lengths, "positions": positions}


def num_rows(store: TokenStore, settings: Perplexity) -> int:
    """Rows that `evaluate` will score in all, for a progress bar; raises what it does."""
    store = chosen(store, settings)
    return sum(rows_at(store, length) for length in settings.lengths)


def rows_at(store: TokenStore, length: int) -> int:
    """Rows in windows of one length."""
    # Documents are numbered from 1 in each window.
    return sum(int(row.segment_ids_BT.max()) for row in WindowIndex(store, length, seed=None))


def chosen(store: TokenStore, settings: Perplexity) -> TokenStore:
    """The tokens that count. Raises ValueError if no document is as long as the longest length."""
    store = store.first(settings.tokens)
    _check_lengths(store, settings.lengths)
    return store


def tokenised(path: str, pattern: str, tokenizer, end_id: int | None, most: int) -> TokenStore:
    """The documents at `path` as ids, as many as hold `most` predicted tokens.

    `tokenizer` is the library's own (`data.tokenizer.read_backend`); with an `end_id` that follows
    each document. Raises FileNotFoundError or ValueError if there is no text.
    """
    pieces: list[np.ndarray] = []
    count = 0
    for text in encoding.texts(Source(path=path, pattern=pattern)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces.append(np.array(ids if end_id is None else [*ids, end_id], np.uint32))
        count += max(len(pieces[-1]) - 1, 0)
        if count >= most:
            break
    if not pieces:
        raise ValueError(f"No text found at {path!r}; give a file or a directory with UTF-8 text.")
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return TokenStore.of(np.concatenate(pieces), offsets)


def lines(report: dict) -> list[str]:
    """The figures for a reader."""
    rows = [f"{'context':>12}  {'nats':>7}  {'perplexity':>10}  {'tokens':>9}"]
    for each in report["lengths"]:
        rows.append(
            f"{'up to ' + format(each['length'], ','):>12}  {each['nats']:7.4f}  "
            f"{each['perplexity']:10.2f}  {each['tokens']:9,}"
        )
    rows.append("by tokens seen, at the longest:")
    for each in report["positions"]:
        same = each["first"] == each["last"]
        span = f"{each['last']:,}" if same else f"{each['first']:,}-{each['last']:,}"
        rows.append(
            f"{span:>12}  {each['nats']:7.4f}  {_perplexity(each['nats']):10.2f}  "
            f"{each['tokens']:9,}"
        )
    return rows


def _nats(predictor: Predictor, store: TokenStore, length: int, tick: Tick):
    """(tokens seen by each predicted token, its loss), both flat."""
    seen, nats = [], []
    for tokens, targets in slabs(store, length):
        for scored in predictor.score(tokens, targets, tick):
            seen.append(np.arange(1, len(scored.logprob_T) + 1))
            nats.append(-scored.logprob_T)
    return np.concatenate(seen), np.concatenate(nats)


def slabs(store: TokenStore, length: int):
    """(rows of tokens, their targets) of windows of `length`, some hundred rows at a time."""
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for window in WindowIndex(store, length, seed=None):
        rows.extend(_segments(window))
        if len(rows) >= _SLAB:
            yield tuple(zip(*rows, strict=True))
            rows = []
    if rows:
        yield tuple(zip(*rows, strict=True))


def _segments(window):
    """(tokens, targets) of each document in a window; packed documents never see one another."""
    ids_T = window.segment_ids_BT
    edges = [0, *(np.flatnonzero(np.diff(ids_T)) + 1), len(ids_T)]
    for begin, end in itertools.pairwise(edges):
        if ids_T[begin]:
            yield window.tokens_BT[begin:end], window.targets_BT[begin:end]


def _check_lengths(store: TokenStore, lengths: Sequence[int]) -> None:
    longest = int(store.lengths.max(initial=0)) - 1
    if longest < max(lengths):
        raise ValueError(
            f"No document of the text gives a context of {max(lengths):,} tokens: the longest has "
            f"{longest + 1:,} tokens. Give longer documents, raise --perplexity.tokens, or ask for "
            "shorter --perplexity.lengths."
        )


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))
