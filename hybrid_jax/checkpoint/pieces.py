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

from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.names.rules import Rule


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
        parts = {box: who for box, who in holders[rule.leaf].items() if rule.share(box)}
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
    published = None
    for box, shard in _shards(array).items():
        share = rule.share(box)
        if share is None:
            continue
        found = _cut(rule, box, shard)
        if found.shape == rule.split_shape:
            return found.reshape(rule.shape)
        if published is None:
            published = np.empty(rule.split_shape, found.dtype)
        published[share.slices] = found
    assert published is not None, rule.name
    return published.reshape(rule.shape)


def parts(rule: Rule, array: jax.Array, box: Box) -> Iterator[tuple[Box, np.ndarray]]:
    """A part of a leaf that this process holds, as boxes of the published tensor."""
    return published(rule, box, _shards(array)[box])


def published(rule: Rule, box: Box, part) -> Iterator[tuple[Box, np.ndarray]]:
    """The rule's share of a part of a leaf, as boxes of the published tensor."""
    share = rule.share(box)
    assert share is not None, f"{rule.name} has nothing in {box} of {rule.leaf}"
    return _fused(_cut(rule, box, part), share.begin, rule.split_shape, rule.shape)


def _cut(rule: Rule, box: Box, part) -> np.ndarray:
    return rule.to_share(np.asarray(part[rule.within(box)]))


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
        found.setdefault(Box.of(index, array.shape), set()).add(device.process_index)
    return {box: frozenset(who) for box, who in found.items()}


def _shards(array: jax.Array) -> dict[Box, jax.Array]:
    """What this process holds of a leaf, each part once."""
    return {Box.of(shard.index, array.shape): shard.data for shard in array.addressable_shards}


def _count(rule: Rule, box: Box) -> int:
    share = rule.share(box)
    return 0 if share is None else share.size


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
        yield Box.at(place, sizes), found[index].reshape(sizes)


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
