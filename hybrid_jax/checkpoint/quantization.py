"""Weights quantised as they are read, one stored tensor at a time: no other ever exists whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.sharding import NamedSharding

from hybrid_jax.checkpoint import leaves, loading
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.opened import Checkpoint
from hybrid_jax.model import quantized
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.model.params import matrix_dims

_KEPT = "F8_E4M3"


class QuantizingReader:
    """Reads parameters for `leaves.fill`: arrays, or values and scales of what is quantised.

    With a placement each device gets the part that it stores, piece by piece, and a process
    reads and quantises the tensors that its devices have a share of. Host memory is that of
    a tensor, and of the scales of a parameter.

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
        self._axes = leaves.axes(checkpoint.config)
        self._where = {} if placement is None else leaves.shardings(checkpoint.config, placement)
        self._checkpoint, self._scheme, self._check_finite = checkpoint, scheme, check_finite
        # As stored: rows are outputs.
        self._block = quantized.BLOCK if checkpoint.block is None else checkpoint.block[::-1]

    def __call__(self, leaf: str, shape: tuple[int, ...], dtype: np.dtype):
        """One parameter of our tree, on its devices. Raises what reading and placing it do."""
        axes = self._axes[leaf]
        lead = len(shape) - len(axes)
        at_rest = self._where.get(leaf)
        own = quantized.tile(self._scheme, axes, shape[lead:], self._block)
        if own is None:
            return loading.load(
                self._checkpoint, leaf, shape, dtype, at_rest, check_finite=self._check_finite
            )
        tiles, sides = (1,) * lead + own, [own[side[-1]] for side in matrix_dims(axes) or ()]
        # Of all of it, for they are few; filled where this process needs them.
        scales = np.zeros(quantized.scale_shape(shape, own), np.float32)

        def read(part: Box):
            for rule, block, scale in self._blocks(leaf, part, tiles, sides):
                scales[rule.slices()] = scale
                place, whole = rule.place(rule.share(part)), rule.place(Box.whole(rule.split_shape))
                yield place, block.reshape(whole.shape)[place.within(whole).slices]

        held, qtype = quantized.HELD[self._scheme], quantized.DTYPES[self._scheme]
        values = loading.deal(read, shape, held, at_rest, at_once=True)
        found = qwix.QArray(values, scales, qtype=qtype)
        if at_rest is None:
            return dataclasses.replace(found, scale=jnp.asarray(scales))
        found = quantized.divisible(found, at_rest)
        where = NamedSharding(at_rest.mesh, quantized.split(found, at_rest.spec).scale)
        scale = jax.make_array_from_callback(found.scale.shape, where, lambda at: found.scale[at])
        return dataclasses.replace(found, scale=scale)

    def _blocks(self, leaf: str, part: Box, tiles: quantized.Tile, sides: list[int]):
        """(rule, values, scales) of the block of each tensor that has a share in a part."""
        checkpoint = self._checkpoint
        rules = {rule.name: rule for rule in checkpoint.rules_of(leaf) if rule.share(part)}
        kept = [name for name in rules if self._is_kept(name)]
        check = self._check_finite
        names = (checkpoint.scales[name] for name in kept)
        scales = dict(checkpoint.read(names, dequantize=False, check_finite=check))
        for name, stored in checkpoint.read(kept, dequantize=False, check_finite=check):
            rule, scale = rules[name], scales.pop(checkpoint.scales[name])
            scale = _scale_block(rule, _of_block(rule, tiles), scale, checkpoint, sides)
            yield rule, rule.to_block(stored.view(np.uint8)), scale
        others = [name for name in rules if name not in set(kept)]
        for name, stored in checkpoint.read(others, dequantize=True, check_finite=check):
            rule = rules[name]
            own = _of_block(rule, tiles)
            yield rule, *quantized.quantize_on_host(rule.to_block(stored), self._scheme, own)

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
