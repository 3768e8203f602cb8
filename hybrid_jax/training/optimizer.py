"""Gradients to updates: the only file that calls optax."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hybrid_jax.config import optimizer as optimizer_config
from hybrid_jax.config import training as config_lib
from hybrid_jax.model.params import matrix_dims
from hybrid_jax.training import schedule, tuning
from hybrid_jax.training.parameters import Named
from sharding import Logical


def is_decayed(axes: tuple[Logical, ...]) -> bool:
    """Whether weight decay applies: matrices that read or write the residual stream, nothing else.

    A low-rank correction of one counts, both halves of it.

    Decided by what the dims mean, not by how many there are: the norm inside attention is stored
    [heads, head_dim] and is still a vector of scales, and stacked layers add dims to everything.
    """
    return len(axes) > 1 and (Logical.MODEL in axes or Logical.RANK in axes)


def is_frozen(axes: tuple[Logical, ...]) -> bool:
    """Whether gradients never move it: one number an expert, which only steers selection."""
    return axes == (Logical.EXPERTS,)


class Optimizer:
    """Clipping, AdamW or Muon, decay and a schedule; what is done to which by logical axes."""

    def __init__(self, config: config_lib.TrainConfig, axes: dict[str, tuple[Logical, ...]]):
        """`axes` says what the dims of each parameter mean, stacked layers left out.

        ValueError if `config.tuning` names parameters that are not there.
        """
        self._config = config
        self.trained = tuning.trained(config.tuning, axes)
        """Names of the parameters that learn: others have no moments and are never changed."""
        axes = {name: own for name, own in axes.items() if name in self.trained}
        chosen = config.optimizer
        frozen = {name: is_frozen(own) for name, own in axes.items()}
        decayed = {name: is_decayed(own) for name, own in axes.items()}
        transforms = [optax.masked(optax.set_to_zero(), frozen)]
        if chosen.clip_norm is not None:
            transforms.append(optax.clip_by_global_norm(chosen.clip_norm))
        transforms += _DIRECTIONS[type(chosen)](chosen, axes)
        transforms.append(optax.add_decayed_weights(chosen.weight_decay, mask=decayed))
        self._transform = optax.chain(*transforms)

    def init(self, params: Named):
        """The state before the first update; moments are as configured, whatever parameters are."""
        with jax.numpy_dtype_promotion("standard"):
            state = self._transform.init(_float32(self.split(params)[0]))
        return _moments_as(self._config.optimizer.moments, state)

    def split(self, params: Named) -> tuple[Named, Named]:
        """(those that learn, the others)."""
        learns = {name: array for name, array in params.items() if name in self.trained}
        return learns, {name: array for name, array in params.items() if name not in learns}

    def learning_rate(self, step) -> jax.Array:
        """The rate of update `step`, from 0."""
        return schedule.learning_rate(self._config, step)

    def update(self, params: Named, gradients: Named, state, step):
        """(new params, new state, norm of the gradients before clipping).

        `gradients` are of the parameters that learn; the others come back as they are. Every array
        keeps its dtype; arithmetic is float32.
        """
        # optax mixes Python and array types freely; this is the one place that lets it.
        with jax.numpy_dtype_promotion("standard"):
            learns, others = self.split(params)
            values, gradients = _float32(learns), _float32(gradients)
            norm = optax.tree.norm(gradients)
            moments = _moments_as("float32", state)
            updates, new_state = self._transform.update(gradients, moments, values)
            new_state = _moments_as(self._config.optimizer.moments, new_state)
            rate = self.learning_rate(step)
            new_params = {
                name: (values[name] - rate * updates[name]).astype(params[name].dtype)
                for name in learns
            }
        _check_dtypes(state, new_state)
        return others | new_params, new_state, norm


def _adamw(config: optimizer_config.Optimizer, axes) -> list:
    return [optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)]


def _muon(config: optimizer_config.Muon, axes) -> list:
    dims = {name: matrix_dims(own) for name, own in axes.items()}
    is_matrix = {name: found is not None for name, found in dims.items()}
    is_other = {name: not matrix for name, matrix in is_matrix.items()}

    def numbers(updates):
        """Dims of the matrices for optax, past those of stacked layers."""

        def one(name, update):
            found = dims[name]
            if found is None:
                return optax.MaskedNode()
            lead = update.ndim - len(axes[name])
            shifted = (tuple(lead + dim for dim in side) for side in found)
            return optax.contrib.MuonDimensionNumbers(*shifted)

        return {name: one(name, update) for name, update in updates.items()}

    def as_large_as_adam(updates, params):
        # An orthogonal matrix has a root mean square of max(rows, columns) ** -0.5.
        def one(update, found):
            sizes = (math.prod(update.shape[dim] for dim in side) for side in found)
            return update * (config.rms * max(sizes) ** 0.5)

        return jax.tree.map(one, updates, numbers(updates))

    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=config.iterations,
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_dimension_numbers=numbers,
    )
    return [
        optax.masked(orthogonal, is_matrix),
        optax.masked(optax.stateless(as_large_as_adam), is_matrix),
        optax.masked(optax.chain(*_adamw(config, axes)), is_other),
    ]


_DIRECTIONS: dict[type, Callable[..., list]] = {
    optimizer_config.AdamW: _adamw,
    optimizer_config.Muon: _muon,
}


def _float32(named: Named) -> Named:
    return {name: array.astype(jnp.float32) for name, array in named.items()}


def _moments_as(dtype: str, state):
    """All that is kept by parameter in one dtype; counts and constants as they are."""

    def one(path, array):
        return array.astype(dtype) if isinstance(path[-1], jax.tree_util.DictKey) else array

    return jax.tree_util.tree_map_with_path(one, state)


def _check_dtypes(before, after) -> None:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert all(old.dtype == new.dtype for old, new in pairs), "optax changed a dtype"
