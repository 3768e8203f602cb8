"""Parts of our parameters, put together from what the published tensors have of them."""

import collections
import concurrent.futures
import typing
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from hybrid_jax.checkpoint import finite, fp8
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats import protocol
from hybrid_jax.checkpoint.names.rules import Rule

if typing.TYPE_CHECKING:
    from hybrid_jax.checkpoint.opened import Checkpoint

# Stored bytes read at a time by each of so many threads; twice to four times as much is held of
# each while its dtype changes. Long enough for a disk, and enough in flight for a store.
PIECE_BYTES = 1 << 24
THREADS = 8


def read(
    checkpoint: "Checkpoint", leaf: str, part: Box, dtype: np.dtype, *, check_finite: bool = True
) -> Iterator[tuple[Box, np.ndarray]]:
    """(place in the leaf, values of `dtype`) of everything in a part of it, each once.

    Read are the bytes that the part needs, where the container has ranges, and of FP8 weights the
    scales of the blocks that it touches. Otherwise each tensor that has a share is read whole. A
    few pieces are in memory at a time. ValueError for a weight that is not finite.
    """
    dtype = np.dtype(dtype)
    source, order = checkpoint.source, checkpoint.order
    shares = ((rule, rule.share(part)) for rule in checkpoint.rules_of(leaf))
    wanted = [(rule, share) for rule, share in shares if share is not None]
    wanted.sort(key=lambda item: order[item[0].name])

    def finish(rule: Rule, share: Box, stored: np.ndarray, scales) -> tuple[Box, np.ndarray]:
        values = _checked(checkpoint, rule.name, stored, check_finite)
        if rule.name in checkpoint.scales:
            values = _dequantized(checkpoint, rule, share, values, scales, check_finite)
        return rule.place(share), _converted(rule.to_part(values), dtype)

    if isinstance(source, protocol.RangedSource):
        read_part = source.read_part

        def ranged(item: tuple[Rule, Box]) -> tuple[Box, np.ndarray]:
            rule, share = item
            stored = read_part(rule.name, rule.split_shape, share)
            return finish(rule, share, stored, read_part)

        yield from _in_threads(ranged, _cut(wanted, source))
        return
    by_name = {rule.name: (rule, share) for rule, share in wanted}
    # Scales first: they may lie in the groups of the weights, which are then opened once more.
    tables = [checkpoint.scales[name] for name in by_name if name in checkpoint.scales]
    scales = dict(source.read_many(tables))
    for name, array in source.read_many(by_name):
        rule, share = by_name[name]
        stored = array.reshape(rule.split_shape)[share.slices]
        yield finish(rule, share, stored, lambda name, _, part: scales[name][part.slices])


def _cut(wanted: Iterable[tuple[Rule, Box]], source: protocol.Source):
    for rule, share in wanted:
        itemsize = protocol.DTYPES[source.tensors[rule.name].dtype].itemsize
        for piece in share.pieces(PIECE_BYTES // itemsize):
            yield rule, piece


def _in_threads(work: Callable, items: Iterable) -> Iterator:
    """`work` of every item, in their order, some ahead of whoever takes them."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _checked(checkpoint, name: str, array: np.ndarray, check_finite: bool) -> np.ndarray:
    if check_finite:
        finite.check(array, name, checkpoint.source.locate(name))
    return array


def _dequantized(checkpoint, rule: Rule, share: Box, stored, read_part, check_finite: bool):
    """With the scales of the blocks that the share touches, by `read_part(name, shape, part)`."""
    rows, columns = rule.indices(share)
    name, block = checkpoint.scales[rule.name], checkpoint.block
    shape = checkpoint.source.tensors[name].shape
    scale = read_part(name, shape, fp8.scale_part(rows, columns, block))
    scale = _checked(checkpoint, name, scale, check_finite)
    table = stored.reshape(len(rows), len(columns))
    return fp8.dequantize(table, scale, block, rows, columns).reshape(share.shape)


def _converted(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype != dtype:
        return values.astype(dtype, order="C")
    # As integers: numpy moves those without holding other threads up.
    return np.ascontiguousarray(values.view(f"u{dtype.itemsize}")).view(dtype)
