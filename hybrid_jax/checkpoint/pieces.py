"""Which devices hold which part of a published tensor, and where that part lies in it.

A leaf of the model is dealt out to devices in boxes. A published tensor is one block of a leaf with
its dims in another order and some of them fused: a box of the leaf becomes one or several boxes of
the tensor, and each of these runs of consecutive numbers in a file.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybrid_jax.checkpoint.names.rules import Rule


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of an array."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What of a tensor one process writes: `parts` of its leaf; None is all of it, put together."""

    process: int
    parts: tuple[Box, ...] | None


def deal(rules: Sequence[Rule], arrays: Mapping[str, jax.Array]) -> dict[str, list[Piece]]:
    """Who writes what of each published tensor; all processes find the same.

    One that holds all parts of a tensor writes it whole. Of several that could write a part, the
    one with the least to do does.
    """
    load: dict[int, int] = {}
    holders = {leaf: _holders(array) for leaf, array in arrays.items()}
    dealt: dict[str, list[Piece]] = {}
    for rule in rules:
        size = np.dtype(arrays[rule.leaf].dtype).itemsize
        parts = {
            box: who for box, who in holders[rule.leaf].items() if _local(rule, box) is not None
        }
        every = frozenset.intersection(*parts.values())
        jobs = [(None, every)] if every else [((box,), who) for box, who in parts.items()]
        dealt[rule.name] = []
        for boxes, who in jobs:
            process = min(who, key=lambda one: (load.get(one, 0), one))
            count = math.prod(rule.shape) if boxes is None else _count(rule, boxes[0])
            load[process] = load.get(process, 0) + count * size
            dealt[rule.name].append(Piece(process, boxes))
    return dealt


def whole(rule: Rule, array: jax.Array) -> np.ndarray:
    """A published tensor of which this process holds every part."""
    block = None
    for box, shard in _shards(array).items():
        local = _local(rule, box)
        if local is None:
            continue
        begin, found = _kept(rule, box.begin), np.asarray(shard[local])
        if found.shape == rule.block_shape:
            return rule.from_block(found)
        if block is None:
            block = np.empty(rule.block_shape, found.dtype)
        block[tuple(slice(b, b + n) for b, n in zip(begin, found.shape, strict=True))] = found
    assert block is not None, rule.name
    return rule.from_block(block)


def parts(rule: Rule, array: jax.Array, box: Box) -> Iterator[tuple[Box, np.ndarray]]:
    """A part of a leaf that this process holds, as boxes of the published tensor."""
    return published(rule, box, _shards(array)[box])


def published(rule: Rule, box: Box, part) -> Iterator[tuple[Box, np.ndarray]]:
    """The rule's share of a part of a leaf, as boxes of the published tensor."""
    found = np.asarray(part[_local(rule, box)])
    begin = _kept(rule, box.begin)
    split = rule.split or rule.shape
    if rule.order:
        back = np.argsort(rule.order)
        found, begin = found.transpose(back), tuple(begin[i] for i in back)
    return _fused(found, begin, split, rule.shape)


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, tuple]]:
    """(place of the first number in the whole, index into the box) of each consecutive run."""
    inner = len(shape)
    while inner > 0 and box.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    # The first dim of which only a part is there is consecutive too.
    outer = max(inner - 1, 0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(b * stride for b, stride in zip(box.begin, strides, strict=True))
    for index in np.ndindex(*box.shape[:outer]):
        yield first + sum(i * stride for i, stride in zip(index, strides)), index


def _holders(array: jax.Array) -> dict[Box, frozenset[int]]:
    """Which processes hold each part of a leaf. One that each has for itself is the same in all."""
    if array.is_fully_addressable:
        return dict.fromkeys(_shards(array), frozenset(range(jax.process_count())))
    found: dict[Box, set[int]] = {}
    places: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    for device, index in places.items():
        found.setdefault(_box(index, array.shape), set()).add(device.process_index)
    return {box: frozenset(who) for box, who in found.items()}


def _shards(array: jax.Array) -> dict[Box, jax.Array]:
    """What this process holds of a leaf, each part once."""
    return {_box(shard.index, array.shape): shard.data for shard in array.addressable_shards}


def _box(index, shape) -> Box:
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return Box(tuple(begin for begin, _ in bounds), tuple(end - begin for begin, end in bounds))


def _local(rule: Rule, box: Box) -> tuple | None:
    """The rule's block in a part of its leaf, as an index; None if it has nothing there."""
    index: list[int | slice] = []
    for wanted, begin, size in zip(_picks(rule, len(box.shape)), box.begin, box.shape, strict=True):
        if wanted is None:
            index.append(slice(None))
        elif begin <= wanted < begin + size:
            index.append(wanted - begin)
        else:
            return None
    return tuple(index)


def _picks(rule: Rule, dims: int) -> tuple[int | None, ...]:
    """One item a dim of the leaf: which number of it the block has, None for all."""
    return rule.index + (None,) * (dims - len(rule.index))


def _kept(rule: Rule, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Of one number a dim of the leaf, those of the dims of the block."""
    picks = _picks(rule, len(sizes))
    return tuple(size for size, item in zip(sizes, picks, strict=True) if item is None)


def _count(rule: Rule, box: Box) -> int:
    return math.prod(_kept(rule, box.shape))


def _fused(
    found: np.ndarray, begin: tuple[int, ...], split: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[Box, np.ndarray]]:
    """A box of `split` dims as boxes of `shape`, whose dims are fused from them."""
    groups, at = [], 0
    for size in shape:
        end, count = at, 1
        # A dim of 1 may be fused from none at all.
        while count != size or (size == 1 and end < len(split) and split[end] == 1):
            count, end = count * split[end], end + 1
        groups.append(slice(at, end))
        at = end
    fused = [list(_ranges(begin[group], found.shape[group], split[group])) for group in groups]
    for chosen in itertools.product(*fused):
        place = tuple(first for first, _, _ in chosen)
        sizes = tuple(count for _, count, _ in chosen)
        index = tuple(item for _, _, local in chosen for item in local)
        yield Box(place, sizes), found[index].reshape(sizes)


def _ranges(begin, counts, sizes) -> Iterator[tuple[int, int, tuple]]:
    """(first, how many, index into the box) of the consecutive ranges of dims fused into one."""
    if not sizes:
        yield 0, 1, ()
    elif counts[1:] == sizes[1:]:
        inner = math.prod(sizes[1:])
        yield begin[0] * inner, counts[0] * inner, (slice(None),) * len(sizes)
    else:
        inner = math.prod(sizes[1:])
        for i in range(counts[0]):
            for first, count, local in _ranges(begin[1:], counts[1:], sizes[1:]):
                yield (begin[0] + i) * inner + first, count, (i, *local)
