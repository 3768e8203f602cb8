"""A model and runs small enough to train in seconds, shared by the tests of training."""

import dataclasses
import io
import os

import jax
import numpy as np

from hybrid_jax import training
from hybrid_jax.config import data, layers, model
from hybrid_jax.config import training as t
from hybrid_jax.config.observation import Observation
from hybrid_jax.config.presets import own
from hybrid_jax.data import Batch

VOCAB = 320


def small_model(num_kv_heads: int = 1, **changes) -> model.ModelConfig:
    """Both mixers and a mixture of experts in two layers."""
    config = own.hybrid(
        "small",
        vocab_size=VOCAB,
        hidden_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        rotary_dim=16,
        ffn=layers.MoeFfn(
            num_experts=4, hidden_dim=32, router=layers.SoftmaxTopK(experts_per_token=2)
        ),
        period=2,
    )
    return dataclasses.replace(config, **changes)


def dense_model(**changes) -> model.ModelConfig:
    """One layer of softmax attention and a dense feed-forward: what compiles fastest."""
    config = small_model(num_kv_heads=2)
    layer = dataclasses.replace(config.layers[1], ffn=layers.DenseFfn(hidden_dim=32))
    pattern = (model.Run(layer=layer, count=1),)
    return dataclasses.replace(config, pattern=pattern, repeats=1, **changes)


def small_run(path="unused", **changes) -> t.TrainConfig:
    """Eight steps of four windows of 32 tokens."""
    config = t.TrainConfig(
        model=small_model(),
        data=data.text(str(path), sequence_length=32, heldout_fraction=0.3),
        steps=8,
        batch_size=4,
        schedule=t.Schedule(peak=3e-3, warmup_steps=2),
        checkpoints=t.Checkpoints(every=3, keep=2),
        evaluation=t.Evaluation(every=4, batches=1),
        # A program more to compile; `test_observation` has it.
        observation=Observation(state_norms=False),
    )
    return dataclasses.replace(config, **changes)


def train(config, path, **options) -> training.Outcome:
    """`training.train` on one of the simulated devices unless told otherwise."""
    return training.train(config, path, **{"devices": jax.devices()[:1]} | options)


class Interrupting(io.StringIO):
    """An output that sends this process a signal when a note or line says `when`."""

    def __init__(self, when: str, number):
        super().__init__()
        self._when, self._number = when, number

    def write(self, words):
        if self._when in words:
            os.kill(os.getpid(), self._number)
        return super().write(words)


def write_text(folder, documents: int = 12):
    """Some text whose next word is easy to guess."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "lambda", "yield"]
    for d in range(documents):
        start = rng.integers(len(words))
        text = " ".join(words[(start + i) % len(words)] for i in range(60))
        (folder / f"{d}.txt").write_text(text)
    return folder


def random_batch(rows: int, length: int, seed: int = 0) -> Batch:
    """Two documents a row, padding at the end of the first row."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, VOCAB, (2, rows, length)).astype(np.int32)
    time = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    cut = length // 3
    segments = np.where(time < cut, 1, 2).astype(np.int32)
    positions = np.where(time < cut, time, time - cut).astype(np.int32)
    segments[0, -5:], positions[0, -5:] = 0, 0
    return Batch(tokens, targets, segments, positions, (segments > 0).astype(np.float32))
