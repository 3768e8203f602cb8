"""One rule a tensor: its published name and shape, its place in our tree, and the way between."""

import dataclasses
import math

import numpy as np

from hybrid_jax.checkpoint.boxes import Box


@dataclasses.dataclass(frozen=True)
class Rule:
    """`leaf[index] = published.reshape(split).transpose(order)`, and the inverse.

    `index` has one item a leading dim of the leaf: a number picks, None keeps the dim; dims past
    its end are kept. Every published tensor fills one block of one leaf, and the blocks of a
    complete vocabulary tile every leaf, so both directions are total.
    """

    name: str
    """Published name."""
    shape: tuple[int, ...]
    """Published shape."""
    leaf: str
    """Path of the parameter in our tree, e.g. `stack.runs.0.mixer.qkv`."""
    index: tuple[int | None, ...] = ()
    """Which block of the leaf."""
    split: tuple[int, ...] | None = None
    """The published shape with fused dims taken apart; None if nothing is fused."""
    order: tuple[int, ...] | None = None
    """The split dims in our order; None if they are already."""

    @property
    def split_shape(self) -> tuple[int, ...]:
        """The published shape with fused dims taken apart."""
        return self.shape if self.split is None else self.split

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the block in our tree."""
        split = self.split_shape
        return tuple(split[i] for i in self.order) if self.order else split

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(range(len(self.split_shape))) if self.order is None else self.order

    @property
    def _picks(self) -> list[tuple[int, int]]:
        """(dim of the leaf, the one index of it that is ours), ascending."""
        return [(dim, item) for dim, item in enumerate(self.index) if item is not None]

    def to_block(self, published: np.ndarray) -> np.ndarray:
        """The published tensor as our block; a view."""
        block = published.reshape(self.split_shape)
        return block.transpose(self.order) if self.order else block

    def from_block(self, block: np.ndarray) -> np.ndarray:
        """Our block as the published tensor."""
        if self.order:
            block = block.transpose(np.argsort(self.order))
        return block.reshape(self.shape)

    def slices(self) -> tuple:
        """`index` as numpy understands it."""
        return tuple(slice(None) if item is None else item for item in self.index)

    def share(self, part: Box) -> Box | None:
        """What of the published tensor, in its split shape, lies in a part of the leaf, if any."""
        if any(not part.begin[dim] <= item < part.end[dim] for dim, item in self._picks):
            return None
        picked = {dim for dim, _ in self._picks}
        kept = [dim for dim in range(len(part.begin)) if dim not in picked]
        # Dims of the leaf in the order of the published ones.
        dims = [dim for _, dim in sorted(zip(self._order, kept, strict=True))]
        return Box(*(tuple(side[dim] for dim in dims) for side in (part.begin, part.end)))

    def place(self, share: Box) -> Box:
        """Where a share lies in the leaf; the inverse of `share`."""
        begin, end = ([side[dim] for dim in self._order] for side in (share.begin, share.end))
        for dim, item in self._picks:
            begin.insert(dim, item)
            end.insert(dim, item + 1)
        return Box(tuple(begin), tuple(end))

    def to_part(self, values: np.ndarray) -> np.ndarray:
        """The values of a share as they lie in the leaf at its `place`; a view."""
        picks = tuple(dim for dim, _ in self._picks)
        return np.expand_dims(values.transpose(self._order), picks)

    def within(self, part: Box) -> tuple[int | slice, ...]:
        """The block's values in a part of the leaf that has some, as an index into that part."""
        index: list[int | slice] = [slice(None)] * len(part.begin)
        for dim, item in self._picks:
            index[dim] = item - part.begin[dim]
        return tuple(index)

    def to_share(self, values: np.ndarray) -> np.ndarray:
        """What lies in the leaf `within` a part as its `share` of the published tensor; a view."""
        return values.transpose(np.argsort(self._order))

    def indices(self, share: Box) -> list[np.ndarray]:
        """Of each dim of the published shape, which indices a share takes, ascending."""
        sizes = list(zip(self.split_shape, share.begin, share.end, strict=True))
        found = []
        for whole in self.shape:
            index, count = np.zeros(1, np.int64), 1
            while sizes and (count < whole or sizes[0][0] == 1):
                size, begin, end = sizes.pop(0)
                index = (index[:, None] * size + np.arange(begin, end)).reshape(-1)
                count *= size
            found.append(index)
        return found

    def covers(self, other: "Rule") -> bool:
        """Whether the other rule's block lies inside this one's."""
        if self.leaf != other.leaf:
            return False
        pairs = zip(self.index, other.index + (None,) * len(self.index), strict=False)
        return all(mine is None or mine == theirs for mine, theirs in pairs)

    def cut(self, block: np.ndarray, other: "Rule") -> np.ndarray:
        """The other rule's block out of this one's, which must cover it."""
        mine = self.index + (None,) * (len(other.index) - len(self.index))
        kept = [theirs for m, theirs in zip(mine, other.index, strict=False) if m is None]
        return block[tuple(slice(None) if item is None else item for item in kept)]


def check_tiling(rules: list[Rule], leaves: dict[str, tuple[int, ...]]) -> None:
    """Every leaf filled once and completely, every name used once; ValueError says which is not."""
    names = [rule.name for rule in rules]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"The vocabulary uses the name {twice!r} twice.")
    filled = dict.fromkeys(leaves, 0)
    for rule in rules:
        if rule.leaf not in leaves:
            raise ValueError(f"{rule.name!r} goes to {rule.leaf!r}, which the model does not have.")
        shape = leaves[rule.leaf]
        kept = [n for n, i in zip(shape, rule.index, strict=False) if i is None]
        if tuple(kept) + shape[len(rule.index) :] != rule.block_shape:
            raise ValueError(
                f"{rule.name!r} gives a block {rule.block_shape} for {rule.leaf}{list(rule.index)}"
                f", which has shape {shape}."
            )
        filled[rule.leaf] += math.prod(rule.block_shape)
    for leaf, shape in leaves.items():
        if filled[leaf] != math.prod(shape):
            raise ValueError(
                f"Rules fill {filled[leaf]} of {math.prod(shape)} values of the parameter {leaf!r}."
            )
