"""A model's parameters as a plain dict by name, and the model back from it.

Training holds parameters, gradients, moments and checkpoints in this one form: it shards, stores
and prints without knowing Flax.
"""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax import model as model_lib
from hybrid_jax.config import tuning as tuning_config
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model import lowrank
from hybrid_jax.training import tuning as tuning_lib
from sharding import Logical

Named = dict[str, jax.Array]
"""Dotted name, e.g. `stack.runs.0.mixer.qkv`, to array."""


FULL = tuning_config.Full()


class Skeleton:
    """A model's structure without its arrays: names, meanings of dims, and how to rebuild it.

    With LoRA `axes` and `abstract` hold the thin matrices too, under names of their own.
    """

    def __init__(self, config: ModelConfig, tuning: tuning_config.Tuning = FULL):
        self.config = config
        self._graphdef, state = nnx.split(model_lib.abstract(config), nnx.Param)
        is_param = lambda leaf: isinstance(leaf, nnx.Variable)
        pairs = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_param)
        self.names: tuple[str, ...] = tuple(_dotted(path) for path, _ in pairs)
        """Those of the model itself."""
        self.axes: dict[str, tuple[Logical, ...]] = {
            name: param.get_metadata()["axes"] for name, (_, param) in zip(self.names, pairs)
        }
        """Meaning of each dim, without those of stacked layers."""
        leaves, self._treedef = jax.tree.leaves(state), jax.tree.structure(state)
        self.abstract: dict[str, jax.ShapeDtypeStruct] = dict(zip(self.names, leaves, strict=True))
        """Shape and dtype of each parameter."""
        self._scale = 0.0
        self._adapters: dict[str, lowrank.Parts] = {}
        if isinstance(tuning, tuning_config.LoRA):
            self._scale = tuning.scale
            for name in tuning_lib.adapted(tuning, self.axes):
                self._adapt(name, tuning.rank)

    def all_axes(self, name: str) -> tuple[Logical, ...]:
        """Meaning of each dim of a parameter, stacked layers included."""
        own = self.axes[name]
        return (Logical.LAYERS,) * (len(self.abstract[name].shape) - len(own)) + own

    def named(self, model: model_lib.Model) -> Named:
        """The arrays of a model of this structure."""
        leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
        return dict(zip(self.names, leaves, strict=True))

    def model(self, named: Named) -> model_lib.Model:
        """The model with these arrays, to train and to measure; traceable.

        With LoRA the thin matrices stay beside their weights; decoding adds them up at each call.
        """
        return self._rebuilt([self._value(name, named) for name in self.names])

    def merged(self, named: Named) -> model_lib.Model:
        """The model with each weight and its thin matrices as one array; traceable."""
        values = [self._value(name, named) for name in self.names]
        return self._rebuilt(
            [value.merged() if isinstance(value, lowrank.LowRank) else value for value in values]
        )

    def with_adapters(self, named: Named, seed: int) -> Named:
        """The arrays of a model with thin matrices that change nothing yet, drawn from `seed`."""
        # Not the key that draws models.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"lora"))
        named = dict(named)
        for name, shapes in self._adapters.items():
            found = lowrank.initial(key, name, self.axes[name], shapes)
            named |= {name + lowrank.A: found.a, name + lowrank.B: found.b}
        return named

    def _adapt(self, name: str, rank: int) -> None:
        own = self.axes[name]
        shapes = lowrank.shapes_of(own, self.abstract[name].shape, rank)
        self._adapters[name] = shapes
        for end, axes, shape in zip((lowrank.A, lowrank.B), lowrank.axes_of(own), shapes):
            self.axes[name + end] = axes
            # float32: what is learnt is small beside the weight.
            self.abstract[name + end] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def _value(self, name: str, named: Named):
        if name not in self._adapters:
            return named[name]
        a, b = named[name + lowrank.A], named[name + lowrank.B]
        return lowrank.LowRank(named[name], a, b, self._scale)

    def _rebuilt(self, values: list) -> model_lib.Model:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, values))


def _dotted(path) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
