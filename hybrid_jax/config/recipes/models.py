"""Changes that a recipe makes to a model."""

import dataclasses

from hybrid_jax.config.layers import SoftmaxAttention
from hybrid_jax.config.model import ModelConfig


def with_rope(model: ModelConfig, theta: float, length: int) -> ModelConfig:
    """Every softmax layer with this rotary base, and room for rows of `length` tokens."""

    def changed(run):
        if not isinstance(run.layer.mixer, SoftmaxAttention):
            return run
        mixer = dataclasses.replace(run.layer.mixer, rope_theta=theta)
        return dataclasses.replace(run, layer=dataclasses.replace(run.layer, mixer=mixer))

    return dataclasses.replace(
        model,
        pattern=tuple(map(changed, model.pattern)),
        max_positions=max(model.max_positions, length),
    )
