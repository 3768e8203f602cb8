"""Parameters of our own model by path: shapes from a config, arrays out of a model and in."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import model as models
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.model.params import logical_axes
from sharding import Logical


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter; allocates nothing."""
    return {path: leaf.shape for path, leaf in _flat(models.abstract(config)).items()}


def shardings(config: ModelConfig, placement: Placement) -> dict[str, jax.sharding.NamedSharding]:
    """Path -> where a placement stores it; ValueError if a dim does not divide."""
    return {
        path: placement.parameter(path, logical_axes(param), param.shape)
        for path, param in _flat(models.abstract(config)).items()
    }


def axes(config: ModelConfig) -> dict[str, tuple[Logical, ...]]:
    """Path -> what the dims of every parameter mean, without those of stacked layers."""
    return {
        path: param.get_metadata()["axes"] for path, param in _flat(models.abstract(config)).items()
    }


def arrays(model: models.Model) -> dict[str, jax.Array]:
    """Path -> array of every parameter of a model."""
    return {path: param[...] for path, param in _flat(model).items()}


def fill(config: ModelConfig, read) -> models.Model:
    """A model whose parameters are `read(path, shape, dtype)`, numpy's or JAX's, one at a time.

    Or arrays of qwix, made of these.
    """
    graph, state = nnx.split(models.abstract(config))
    filled = []
    for path, param in nnx.to_flat_state(state):
        value = read(_name(path), param.shape, np.dtype(param.dtype))
        filled.append((path, param.replace(jax.tree.map(jnp.asarray, value))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _flat(model) -> dict:
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_name(path): param for path, param in state}


def _name(path) -> str:
    return ".".join(map(str, path))
