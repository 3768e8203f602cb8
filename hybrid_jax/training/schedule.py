"""Learning rate by step: linear warm-up, then one of the decays."""

from collections.abc import Callable

import jax.numpy as jnp

from hybrid_jax.config import training as config_lib


def learning_rate(config: config_lib.Schedule, steps: int, step):
    """The rate of update number `step` (from 0) of `steps`; a float32 scalar, traceable.

    The warm-up gives update i the rate peak * (i + 1) / warmup_steps; the decay runs from the end
    of the warm-up to the last update, which gets the final rate.
    """
    step = jnp.asarray(step, jnp.float32)
    # progress: 0 at the first update after the warm-up, 1 at the last one.
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    factor = _DECAYS[type(config.decay)](config.decay, jnp.clip(progress, 0.0, 1.0))
    warm = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
    return config.peak * warm * factor


def _constant(decay: config_lib.Constant, progress):
    return jnp.ones_like(progress)


def _cosine(decay: config_lib.Cosine, progress):
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return decay.final_fraction + (1 - decay.final_fraction) * cosine


def _linear(decay: config_lib.Linear, progress):
    return 1 - (1 - decay.final_fraction) * progress


def _exponential_tail(decay: config_lib.ExponentialTail, progress):
    tail = max(decay.tail_fraction, 1e-9)
    return decay.final_fraction ** (jnp.maximum(progress - (1 - tail), 0.0) / tail)


_DECAYS: dict[type, Callable] = {
    config_lib.Constant: _constant,
    config_lib.Cosine: _cosine,
    config_lib.Linear: _linear,
    config_lib.ExponentialTail: _exponential_tail,
}
