"""What is measured, the same for both sides: sizes, token ids, and the protocol of a side."""

import dataclasses
import time
import typing

import numpy as np

TRAIN_ROWS, TRAIN_LENGTH = 4, 1024
# Updates in a row of a timed run: nobody trains one step, and a process that has waited for its
# turn is slow in the first.
TRAIN_STEPS = 3
PREFILL_LENGTHS = {"prefill_1k": 1024, "prefill_4k": 4096, "prefill_16k": 16384}
DECODE_CONTEXT = 512
DECODE_BATCHES = {"decode_b1": 1, "decode_b8": 8}
# Greedy tokens a timed decode makes.
DECODE_TOKENS = 32
NAMES = ("train", *PREFILL_LENGTHS, *DECODE_BATCHES)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of one task."""

    seconds: float
    output: np.ndarray
    """What is compared between the sides: losses, logits of the last position, or token ids."""


class Side(typing.Protocol):
    """One implementation under test, alive in a process of its own."""

    def train(self, tokens_BT: np.ndarray, steps: int) -> Result:
        """Updates (forward, loss on the next token, backward, clipping, AdamW); the losses."""

    def prefill(self, tokens_BT: np.ndarray) -> Result:
        """Fill a cache; the logits of the last position."""

    def decode(self, tokens_BT: np.ndarray, new_tokens: int) -> Result:
        """Greedy tokens after a context; the prefill of the context is not timed."""


def tokens_of(name: str, vocab_size: int) -> np.ndarray:
    """The token ids of a task, int32 [B, T]: the same for both sides, fixed by the name."""
    generator = np.random.default_rng(NAMES.index(name))
    shape = (TRAIN_ROWS, TRAIN_LENGTH)
    if name in PREFILL_LENGTHS:
        shape = (1, PREFILL_LENGTHS[name])
    elif name in DECODE_BATCHES:
        shape = (DECODE_BATCHES[name], DECODE_CONTEXT)
    return generator.integers(0, vocab_size, shape, dtype=np.int32)


def tokens_measured(name: str) -> int:
    """Tokens that a timed run of a task handles."""
    if name in DECODE_BATCHES:
        return DECODE_BATCHES[name] * DECODE_TOKENS
    return PREFILL_LENGTHS.get(name, TRAIN_STEPS * TRAIN_ROWS * TRAIN_LENGTH)


def perform(side: Side, name: str, vocab_size: int) -> Result:
    """One run of the task called `name`."""
    tokens_BT = tokens_of(name, vocab_size)
    if name == "train":
        return side.train(tokens_BT, TRAIN_STEPS)
    if name in PREFILL_LENGTHS:
        return side.prefill(tokens_BT)
    return side.decode(tokens_BT, DECODE_TOKENS)


class Clock:
    """`with Clock() as clock: ...; clock.seconds`."""

    def __enter__(self):
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._started
