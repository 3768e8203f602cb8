"""A model of ours as a predictor: rows sorted by length, in batches, chunk by chunk with a state.

Only a few programs are compiled, whatever the lengths: a chunk has one of four widths, and the
state's capacity is a power of two (or one number for all, if the longest row is known beforehand).
The logits of a chunk never exist at one time, and those of a row even less.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import inference
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.evaluation.predictor import Scored, Tick, silent
from hybrid_jax.model import Model, abstract
from hybrid_jax.model.parallel.placement import Placement
from sharding import Logical

CHUNKS = (64, 128, 256, 512)
"""Widths of a chunk: the first that holds the longest row of a batch, else the last."""
# Tokens of all rows whose logits exist at one time.
_LOGIT_TOKENS = 1024


class ModelPredictor:
    """`evaluation.Predictor` of a model; right padding is never seen by a real token."""

    _row: Callable = Scored
    """What is said of a row, from a column a field."""

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int = 8,
        placement: Placement | None = None,
        longest: int | None = None,
    ):
        """`longest` is a bound on all rows to come, which then share one capacity.

        With a `placement` the model's parameters live where it stores them (`Placement.place`).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.vocab_size = model.config.vocab_size
        self.model = model
        self._batch_size = batch_size
        self._placement = placement
        self._capacity = 0 if longest is None else _power_of_two(longest)

    def score(
        self, tokens: Iterable[np.ndarray], targets: Iterable[np.ndarray], tick: Tick = silent
    ) -> list[Scored]:
        """See `evaluation.Predictor`. Raises ValueError for ids outside the vocabulary."""
        tokens, targets = list(tokens), list(targets)
        self._check(tokens)
        self._check(targets)
        lengths = [len(row) for row in tokens]
        found: list[Scored | None] = [None] * len(tokens)
        for group in _by_length(lengths, self._batch_size):
            scores = self._score_group([tokens[b] for b in group], [targets[b] for b in group])
            for b, scored in zip(group, scores, strict=True):
                found[b] = scored
            tick(len(group))
        return [scored for scored in found if scored is not None]

    def generate(
        self,
        prompts: Iterable[np.ndarray],
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        tick: Tick = silent,
        **sampling,
    ) -> list[np.ndarray]:
        """See `evaluation.Predictor`. Raises what `inference.generate` does."""
        prompts = list(prompts)
        lengths = [len(row) for row in prompts]
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        for group in _by_length(lengths, self._batch_size):
            width = _power_of_two(max(lengths[b] for b in group))
            tokens_BT = np.zeros((self._batch_size, width), np.int32)
            # A row that is no one's is one token long.
            lengths_B = np.ones(self._batch_size, np.int32)
            for row, b in enumerate(group):
                tokens_BT[row, : lengths[b]] = prompts[b]
                lengths_B[row] = lengths[b]
            new_BT = inference.generate(
                self.model, tokens_BT, max_new_tokens=max_new_tokens, prompt_lengths=lengths_B,
                eos_id=eos_id, placement=self._placement, **sampling,
            )  # fmt: skip
            for b, new_T in zip(group, np.asarray(new_BT)):
                found[b] = new_T
            tick(len(group))
        return found

    def _score_group(self, tokens, targets) -> list[Scored]:
        """Rows that go together, at most a batch of them."""
        B, longest = self._batch_size, max(map(len, tokens))
        C = next((width for width in CHUNKS if longest <= width), CHUNKS[-1])
        num_chunks = -(-longest // C)
        arrays = np.zeros((2, B, num_chunks * C), np.int32)
        for b, rows in enumerate(zip(tokens, targets, strict=True)):
            arrays[:, b, : len(rows[0])] = rows
        capacity = max(_power_of_two(num_chunks * C), self._capacity)
        step, params, state = self._stepping(B, capacity)
        parts = []
        for begin in range(0, num_chunks * C, C):
            chunk = (jnp.asarray(x_BT[:, begin : begin + C]) for x_BT in arrays)
            scored, state = step(params, *chunk, state)
            parts.append(jax.device_get(scored))
        columns = [np.concatenate(column, axis=1) for column in zip(*parts, strict=True)]
        return [
            self._row(*(column[b, : len(row)] for column in columns))
            for b, row in enumerate(tokens)
        ]

    def _stepping(self, batch: int, capacity: int):
        """(step, parameters, state): what scores a chunk, with what, from where."""
        step = make_score_step(self.model.config, self._placement)
        state = self.model.initial_state(batch, capacity, self._placement)
        return step, nnx.split(self.model)[1], state

    def _check(self, rows: Sequence[np.ndarray]) -> None:
        for row in rows:
            if len(row) == 0:
                raise ValueError(
                    "Every row to score must hold at least one token; got an empty one."
                )
            lowest, highest = int(np.min(row)), int(np.max(row))
            if lowest < 0 or highest >= self.vocab_size:
                raise ValueError(
                    f"Token ids must be below vocab_size={self.vocab_size} and not negative; got "
                    f"{lowest if lowest < 0 else highest}. Use the tokenizer of this model."
                )


@functools.cache
def make_score_step(config: ModelConfig, placement: Placement | None = None):
    """A compiled (params, tokens_BC, targets_BC, state) -> ((logprob_BC, best_BC), state).

    Continues every row by C tokens. `params` is what `flax.nnx.split` makes of the model; the old
    state is given up. The same function for the same arguments.
    """
    graphdef, _ = nnx.split(abstract(config))

    def step(params, tokens_BC, targets_BC, state):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(tokens_BC, state=state, placement=placement)
        return _scored(model, hidden.x_BTD, targets_BC, placement), hidden.state

    return jax.jit(step, donate_argnames="state")


def _scored(model: Model, x_BCD, targets_BC, placement: Placement | None):
    """(log-probability of each target, most likely token), [B, C] each."""

    def one(x_BXD, targets_BX):
        logits_BXW = logits_of(model, x_BXD, placement)
        normaliser_BX = jax.nn.logsumexp(logits_BXW, axis=-1)
        picked_BX1 = jnp.take_along_axis(logits_BXW, targets_BX[..., None], axis=-1)
        best_BX = jnp.argmax(logits_BXW, axis=-1).astype(jnp.int32)
        return picked_BX1[..., 0] - normaliser_BX, best_BX

    return by_columns(one, x_BCD, targets_BC)


def logits_of(model: Model, x_BXD, placement: Placement | None):
    """Logits float32 [B, X, vocab] of what the layers made of rows with a decode state."""
    logits_BXW = model.logits(x_BXD)
    if placement is None:
        return logits_BXW
    rows = placement.for_decoding(x_BXD.shape[0])
    return rows.constrain(logits_BXW, Logical.BATCH, None, Logical.VOCAB)


def by_columns(one: Callable, *arrays) -> tuple[jax.Array, ...]:
    """`one(*arrays)` of [B, C, ...], [B, C] each, so few columns at a time that logits fit."""
    B, C = arrays[0].shape[:2]
    width = max(1, min(C, _LOGIT_TOKENS // B))
    while C % width:
        width -= 1

    def cut(x_BCX):
        parts = x_BCX.reshape(B, C // width, width, *x_BCX.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    found = jax.lax.map(lambda parts: one(*parts), tuple(map(cut, arrays)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, C) for x in found)


def _by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the rows in groups of `size`, the longest first: memory runs out at once or never.

    Equal lengths keep their order, so the groups are always the same.
    """
    order = sorted(range(len(lengths)), key=lambda b: (-lengths[b], b))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def _power_of_two(length: int) -> int:
    """The next power of two, at least the width of the smallest chunk."""
    return max(CHUNKS[0], 1 << (length - 1).bit_length())
