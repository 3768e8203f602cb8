"""Weights quantised as they are read, one stored tensor at a time: no other ever exists whole."""

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.sharding import NamedSharding

from hybrid_jax import model as models
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.opened import Checkpoint
from hybrid_jax.model import quantized
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.model.params import matrix_dims
from sharding import Logical

_KEPT = "F8_E4M3"


class QuantizingReader:
    """Reads parameters for `leaves.fill`: arrays, or values and scales of what is quantised.

    With a placement each device gets the part that it stores, straight from host memory.

    FP8 weights with scales stay as they are stored where the scheme is fp8 too: where a block of
    theirs would cross a head, its scale is repeated. All others are widened, and quantised anew.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: str,
        placement: Placement | None = None,
        check_finite: bool = True,
    ):
        """ValueError for an unknown scheme."""
        quantized.check_scheme(scheme)
        state = nnx.to_flat_state(nnx.split(models.abstract(checkpoint.config))[1])
        self._axes = {
            ".".join(map(str, path)): param.get_metadata()["axes"] for path, param in state
        }
        self._checkpoint, self._scheme, self._check_finite = checkpoint, scheme, check_finite
        self._placement = placement
        # As stored: rows are outputs.
        self._block = quantized.BLOCK if checkpoint.block is None else checkpoint.block[::-1]

    def __call__(self, leaf: str, shape: tuple[int, ...], dtype: np.dtype):
        """One parameter of our tree, on its devices. Raises what reading and placing it do."""
        value = self._read(leaf, shape, dtype)
        if self._placement is None:
            return jax.tree.map(jnp.asarray, value)
        axes = (Logical.LAYERS,) * (len(shape) - len(self._axes[leaf])) + self._axes[leaf]
        at_rest = self._placement.parameter(leaf, axes, shape)
        value = quantized.divisible(value, at_rest)
        specs = quantized.split(value, at_rest.spec)

        def dealt(array, spec):
            sharding = NamedSharding(at_rest.mesh, spec)
            return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

        return jax.tree.map(dealt, value, specs)

    def _read(self, leaf: str, shape: tuple[int, ...], dtype: np.dtype):
        axes = self._axes[leaf]
        lead = len(shape) - len(axes)
        own = quantized.tile(self._scheme, axes, shape[lead:], self._block)
        if own is None:
            return self._checkpoint.read_leaf(leaf, shape, dtype, self._check_finite)
        values = np.empty(shape, quantized.HELD[self._scheme])
        scales = np.empty(quantized.scale_shape(shape, own), np.float32)
        sides = [own[side[-1]] for side in matrix_dims(axes) or ()]
        for rule, block in self._blocks(leaf, (1,) * lead + own, sides):
            values[rule.slices()], scales[rule.slices()] = block
        return qwix.QArray(values, scales, qtype=quantized.DTYPES[self._scheme])

    def _blocks(self, leaf: str, tiles: quantized.Tile, sides: list[int]):
        """(rule, (values, scales) of its block of the leaf) of each tensor with a part in it."""
        checkpoint = self._checkpoint
        rules = {rule.name: rule for rule in checkpoint.rules.values() if rule.leaf == leaf}
        kept = [name for name in rules if self._is_kept(name)]
        scales = dict(checkpoint.read((checkpoint.scales[name] for name in kept), dequantize=False))
        for name, stored in checkpoint.read(
            kept, dequantize=False, check_finite=self._check_finite
        ):
            rule, scale = rules[name], scales.pop(checkpoint.scales[name])
            scale = _scale_block(rule, _of_block(rule, tiles), scale, checkpoint, sides)
            yield rule, (rule.to_block(stored.view(np.uint8)), scale)
        others = [name for name in rules if name not in set(kept)]
        for name, stored in checkpoint.read(
            others, dequantize=True, check_finite=self._check_finite
        ):
            rule = rules[name]
            own = _of_block(rule, tiles)
            yield rule, quantized.quantize_on_host(rule.to_block(stored), self._scheme, own)

    def _is_kept(self, name: str) -> bool:
        if self._scheme != "fp8" or name not in self._checkpoint.scales:
            return False
        return self._checkpoint.source.tensors[name].dtype == _KEPT


def _of_block(rule: Rule, tiles: quantized.Tile) -> quantized.Tile:
    """Of the dims that a rule's block keeps."""
    index = rule.index + (None,) * (len(tiles) - len(rule.index))
    return tuple(size for size, item in zip(tiles, index, strict=True) if item is None)


def _scale_block(rule: Rule, own: quantized.Tile, scale, checkpoint, sides) -> np.ndarray:
    """Scales of stored blocks [rows, columns] as those of the tiles of a rule's block.

    Tiles divide stored blocks, and the last dim of each side that was split.
    """
    starts = (
        np.arange(0, size, tile) // block
        for size, tile, block in zip(rule.shape, reversed(sides), checkpoint.block, strict=True)
    )
    cells = scale[np.ix_(*starts)].astype(np.float32)
    split = rule.split or rule.shape
    order = rule.order or tuple(range(len(split)))
    tiles = [own[order.index(dim)] for dim in range(len(split))]
    return cells.reshape([n // t for n, t in zip(split, tiles, strict=True)]).transpose(order)
