"""A model's parameters as a plain dict by name, and the model back from it.

Training holds parameters, gradients, moments and checkpoints in this one form: it shards, stores
and prints without knowing Flax.
"""

import jax
from flax import nnx

from hybrid_jax import model as model_lib
from hybrid_jax.config.model import ModelConfig
from sharding import Logical

Named = dict[str, jax.Array]
"""Dotted name, e.g. `stack.runs.0.mixer.qkv`, to array."""


class Skeleton:
    """A model's structure without its arrays: names, meanings of dims, and how to rebuild it."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._graphdef, state = nnx.split(model_lib.abstract(config), nnx.Param)
        is_param = lambda leaf: isinstance(leaf, nnx.Variable)
        pairs = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_param)
        self.names: tuple[str, ...] = tuple(_dotted(path) for path, _ in pairs)
        self.axes: dict[str, tuple[Logical, ...]] = {
            name: param.get_metadata()["axes"] for name, (_, param) in zip(self.names, pairs)
        }
        """Meaning of each dim, without those of stacked layers."""
        leaves, self._treedef = jax.tree.leaves(state), jax.tree.structure(state)
        self.abstract: dict[str, jax.ShapeDtypeStruct] = dict(zip(self.names, leaves, strict=True))
        """Shape and dtype of each parameter."""

    def all_axes(self, name: str) -> tuple[Logical, ...]:
        """Meaning of each dim of a parameter, stacked layers included."""
        own = self.axes[name]
        return (Logical.LAYERS,) * (len(self.abstract[name].shape) - len(own)) + own

    def named(self, model: model_lib.Model) -> Named:
        """The arrays of a model of this structure."""
        leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
        return dict(zip(self.names, leaves, strict=True))

    def model(self, named: Named) -> model_lib.Model:
        """The model with these arrays; traceable."""
        state = jax.tree.unflatten(self._treedef, [named[name] for name in self.names])
        return nnx.merge(self._graphdef, state)


def _dotted(path) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
