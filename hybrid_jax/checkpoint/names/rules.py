"""One rule a tensor: its published name and shape, its place in our tree, and the way between."""

import dataclasses
import math

import numpy as np


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
    def block_shape(self) -> tuple[int, ...]:
        """Shape of the block in our tree."""
        split = self.split or self.shape
        return tuple(split[i] for i in self.order) if self.order else split

    def to_block(self, published: np.ndarray) -> np.ndarray:
        """The published tensor as our block; a view."""
        block = published.reshape(self.split or self.shape)
        return block.transpose(self.order) if self.order else block

    def from_block(self, block: np.ndarray) -> np.ndarray:
        """Our block as the published tensor."""
        if self.order:
            block = block.transpose(np.argsort(self.order))
        return block.reshape(self.shape)

    def slices(self) -> tuple:
        """`index` as numpy understands it."""
        return tuple(slice(None) if item is None else item for item in self.index)

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
