"""Our side of the comparison: the real training step, prefill and decode loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import checkpoint, inference
from hybrid_jax import model as model_lib
from hybrid_jax.bench.tasks import Clock, Result
from hybrid_jax.config import data, layers, training
from hybrid_jax.config.model import ModelConfig, fold_layers
from hybrid_jax.data import Batch
from hybrid_jax.training import step as step_lib
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import TrainState


class Ours:
    """A model loaded from a Hugging Face directory, with one optimiser state."""

    def __init__(self, directory: str):
        self.model = checkpoint.load(directory)
        # As in the quickstart's preset; a published config.json has no field for it.
        model_config = dataclasses.replace(self.model.config, scan_layers=False)
        config = training.TrainConfig(
            model=model_config,
            data=data.text("unused"),
            steps=10_000,
            # As the other side: cross-entropy alone. The rate is too small to move the weights.
            schedule=training.Schedule(peak=1e-8, warmup_steps=0, decay=training.Constant()),
            loss=training.Loss(balance=None),
        )
        skeleton = Skeleton(model_config)
        optimizer = Optimizer(config, skeleton.axes)
        # A copy: the training step gives its parameters up, prefill and decode go on using theirs.
        params = jax.tree.map(jnp.copy, skeleton.named(self.model))
        self._state = TrainState(jnp.int32(0), params, optimizer.init(params))
        self._step = step_lib.make_train_step(config, skeleton, optimizer)

    def train(self, tokens_BT, steps: int) -> Result:
        batch = _next_token_batch(tokens_BT)
        losses = []
        with Clock() as clock:
            for _ in range(steps):
                self._state, metrics = self._step(self._state, batch)
                losses.append(float(metrics["loss"]))
            jax.block_until_ready(self._state)
        return Result(clock.seconds, np.array(losses, np.float64))

    def prefill(self, tokens_BT) -> Result:
        return timed_prefill(self.model, tokens_BT)

    def decode(self, tokens_BT, new_tokens: int) -> Result:
        _, (logits_BW, state) = _prefilled(self.model, tokens_BT, new_tokens)
        greedy, key = inference.Sampling(), jax.random.key(0)
        with Clock() as clock:
            # The first token comes from the prefill's logits: so many steps, and one token more.
            new, _ = inference.decode(self.model, logits_BW, state, greedy, new_tokens + 1, key)
            out = np.asarray(jax.block_until_ready(new))
        return Result(clock.seconds, out[:, :new_tokens])


def timed_prefill(model: model_lib.Model, tokens_BT) -> Result:
    """Fill a decode state with whole rows; the logits of the last position."""
    seconds, (logits_BW, _) = _prefilled(model, tokens_BT, 0)
    return Result(seconds, np.asarray(logits_BW))


def _prefilled(model: model_lib.Model, tokens_BT, new_tokens: int):
    """(seconds, (logits_BW, state)) of a prefill whose state has room for more tokens."""
    B, T = tokens_BT.shape
    state = model.initial_state(B, T + new_tokens)
    jax.block_until_ready(state)
    with Clock() as clock:
        filled = inference.prefill(model, tokens_BT, np.full((B,), T), state)
        jax.block_until_ready(filled)
    return clock.seconds, filled


def lightning_only(config: ModelConfig) -> ModelConfig:
    """The same model with a lightning mixer in every layer."""
    mixer = next(
        layer.mixer for layer in config.layers if isinstance(layer.mixer, layers.LightningAttention)
    )
    pattern, repeats = fold_layers(
        dataclasses.replace(layer, mixer=mixer) for layer in config.layers
    )
    return dataclasses.replace(config, pattern=pattern, repeats=repeats)


def matmul_gflops(size: int = 2048, runs: int = 5) -> float:
    """The machine's float32 matrix-product rate as JAX reaches it: the best of a few runs."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(matrix, matrix))
    seconds = []
    for _ in range(runs):
        with Clock() as clock:
            jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(clock.seconds)
    return 2 * size**3 / min(seconds) / 1e9


def memory_gigabytes(floats: int = 64 * 2**20, runs: int = 5) -> float:
    """The rate at which the machine reads memory, in GB/s: the best of a few sums of an array."""
    array = jnp.ones((1024, floats // 1024), jnp.float32)
    total = jax.jit(lambda array: jnp.sum(array, axis=1))
    jax.block_until_ready(total(array))
    seconds = []
    for _ in range(runs):
        with Clock() as clock:
            jax.block_until_ready(total(array))
        seconds.append(clock.seconds)
    return array.nbytes / min(seconds) / 1e9


def _next_token_batch(tokens_BT) -> Batch:
    """Every token but the last of a row predicts the next; one segment, as on the other side."""
    B, T = tokens_BT.shape
    targets_BT = np.concatenate([tokens_BT[:, 1:], tokens_BT[:, :1]], axis=1)
    weights_BT = np.ones((B, T), np.float32)
    weights_BT[:, -1] = 0
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens_BT, targets_BT, None, positions_BT, weights_BT)
