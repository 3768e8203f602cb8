"""Learning rate by step: linear warm-up, then one of the decays, or phases by tokens."""

from collections.abc import Callable

import jax.numpy as jnp

from hybrid_jax.config import training as config_lib


def learning_rate(config: config_lib.TrainConfig, step):
    """The rate of update number `step` (from 0); a float32 scalar, traceable.

    The warm-up gives update i the rate peak * (i + 1) / warmup_steps; the decay runs from the end
    of the warm-up to the last update, which gets the final rate. `Phases` are counted in tokens,
    from the first update on.
    """
    chosen = config.schedule
    step = jnp.asarray(step, jnp.float32)
    if isinstance(chosen.decay, config_lib.Phases):
        factor = _phases(chosen.decay, _share_of_tokens(config, step))
    else:
        # progress: 0 at the first update after the warm-up, 1 at the last one.
        progress = (step - chosen.warmup_steps) / max(config.steps - 1 - chosen.warmup_steps, 1)
        factor = _DECAYS[type(chosen.decay)](chosen.decay, jnp.clip(progress, 0.0, 1.0))
    warm = jnp.minimum((step + 1) / max(chosen.warmup_steps, 1), 1.0)
    return chosen.peak * warm * factor


def _share_of_tokens(config: config_lib.TrainConfig, step):
    """Tokens before `step` over those before the last update."""
    last = max(config.steps - 1, 1)
    marks = [first for first, _, _ in config.phases if first < last] + [last]
    tokens = [config.tokens_before(mark) for mark in marks]
    at = jnp.interp(step, jnp.asarray(marks, jnp.float32), jnp.asarray(tokens, jnp.float32))
    return at / tokens[-1]


def _phases(decay: config_lib.Phases, progress):
    """The factor when `progress`, from 0 to 1, of all tokens is done."""
    total = sum(phase.share for phase in decay.phases)
    begin, factor = 0.0, jnp.zeros_like(progress)
    for phase in decay.phases:
        end = begin + phase.share / total
        inside = jnp.clip((progress - begin) / (end - begin), 0.0, 1.0)
        # A phase holds from where it begins until the next does.
        factor = jnp.where(progress >= begin, _SHAPES[phase.shape](phase, inside), factor)
        begin = end
    return factor


_SHAPES: dict[str, Callable] = {
    "constant": lambda phase, x: jnp.full_like(x, phase.start),
    "linear": lambda phase, x: phase.start + (phase.end - phase.start) * x,
    "cosine": lambda phase, x: (
        phase.end + (phase.start - phase.end) * 0.5 * (1 + jnp.cos(jnp.pi * x))
    ),
    "exponential": lambda phase, x: phase.start * (phase.end / phase.start) ** x,
}


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
