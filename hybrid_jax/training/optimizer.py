"""Gradients to updates: the only file that calls optax."""

import jax
import jax.numpy as jnp
import optax

from hybrid_jax.config import training as config_lib
from hybrid_jax.training import schedule
from hybrid_jax.training.parameters import Named
from sharding import Logical


def is_decayed(axes: tuple[Logical, ...]) -> bool:
    """Whether weight decay applies: matrices that read or write the residual stream, nothing else.

    Decided by what the dims mean, not by how many there are: the norm inside attention is stored
    [heads, head_dim] and is still a vector of scales, and stacked layers add dims to everything.
    """
    return Logical.MODEL in axes and len(axes) > 1


def is_frozen(axes: tuple[Logical, ...]) -> bool:
    """Whether gradients never move it: one number an expert, which only steers selection."""
    return axes == (Logical.EXPERTS,)


class Optimizer:
    """AdamW with clipping and a schedule; decay and freezing by the logical axes of parameters."""

    def __init__(self, config: config_lib.TrainConfig, axes: dict[str, tuple[Logical, ...]]):
        """`axes` says what the dims of each parameter mean, stacked layers left out."""
        self._config = config
        adamw = config.optimizer
        frozen = {name: is_frozen(own) for name, own in axes.items()}
        decayed = {name: is_decayed(own) for name, own in axes.items()}
        transforms = [optax.masked(optax.set_to_zero(), frozen)]
        if adamw.clip_norm is not None:
            transforms.append(optax.clip_by_global_norm(adamw.clip_norm))
        transforms += [
            optax.scale_by_adam(b1=adamw.b1, b2=adamw.b2, eps=adamw.eps),
            optax.add_decayed_weights(adamw.weight_decay, mask=decayed),
        ]
        self._transform = optax.chain(*transforms)

    def init(self, params: Named):
        """The state before the first update; moments are as configured, whatever parameters are."""
        with jax.numpy_dtype_promotion("standard"):
            state = self._transform.init(_float32(params))
        return _floats_as(self._config.optimizer.moments, state)

    def learning_rate(self, step) -> jax.Array:
        """The rate of update `step`, from 0."""
        return schedule.learning_rate(self._config, step)

    def update(self, params: Named, gradients: Named, state, step):
        """(new params, new state, norm of the gradients before clipping).

        Every array keeps its dtype; arithmetic is float32.
        """
        # optax mixes Python and array types freely; this is the one place that lets it.
        with jax.numpy_dtype_promotion("standard"):
            values, gradients = _float32(params), _float32(gradients)
            norm = optax.tree.norm(gradients)
            moments = _floats_as("float32", state)
            updates, new_state = self._transform.update(gradients, moments, values)
            new_state = _floats_as(self._config.optimizer.moments, new_state)
            rate = self.learning_rate(step)
            new_params = {
                name: (values[name] - rate * updates[name]).astype(params[name].dtype)
                for name in params
            }
        _check_dtypes(state, new_state)
        return new_params, new_state, norm


def _float32(named: Named) -> Named:
    return {name: array.astype(jnp.float32) for name, array in named.items()}


def _floats_as(dtype: str, tree):
    """All arrays of real numbers in one dtype; counts as they are."""

    def one(array):
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(one, tree)


def _check_dtypes(before, after) -> None:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert all(old.dtype == new.dtype for old, new in pairs), "optax changed a dtype"
