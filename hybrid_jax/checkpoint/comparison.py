"""Two checkpoints of any format and vocabulary, held against each other weight by weight."""

import concurrent.futures
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from hybrid_jax.checkpoint import fp8, nearest
from hybrid_jax.checkpoint.formats.hf_directory import HfDirectory
from hybrid_jax.checkpoint.formats.protocol import DTYPES, RangedSource
from hybrid_jax.checkpoint.names.places import places
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.opened import Checkpoint, open_checkpoint

_THREADS = 4
# Stored tensors up to this size are compared several at a time.
_SMALL = 1 << 28
# Values that are widened to float64 at a time.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Difference:
    """One block of a parameter that is not the same in both."""

    name: str
    """By our own names, with its place: `layers.3.ffn.gate_up[7, :, 0]`."""
    here: str | None
    """The stored tensor that holds it in the first; None if it is missing there."""
    there: str | None
    what: str
    """`missing here`, `missing there`, `shape` or `values`."""
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    size: int = 0
    """Values that were compared."""
    differing: int = 0
    """Of these, values that are not equal (NaN equals NaN)."""
    beyond: int = 0
    """Of these, values further apart than the tolerance."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    """Largest |a - b| / max(|a|, |b|)."""


@dataclasses.dataclass
class Comparison:
    """What two checkpoints have in common, and what not."""

    tolerance: float
    blocks: int = 0
    """Compared by their values."""
    values: int = 0
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)
    """`BF16, F32` -> blocks that are stored so in the first and the second."""
    differences: list[Difference] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """Where the configs describe other networks, and what was not compared."""
    seconds: float = 0.0

    @property
    def beyond(self) -> list[Difference]:
        """Differences that the tolerance does not cover."""
        return [each for each in self.differences if each.what != "values" or each.beyond]


def compare(
    here,
    there,
    *,
    tolerance: float = 0.0,
    step: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Comparison:
    """Compare two checkpoint directories by the parameters of our own model that they fill.

    Formats, names and dtypes may differ; FP8 weights are multiplied with their scales. A few
    tensors are in memory at a time.

    Args:
        here: The first directory, which may be in object storage if it is Hugging Face's.
        there: The second, likewise.
        tolerance: How far two values may be apart, relative to the larger one. 0: not at all;
            0.004 allows for one rounding to bfloat16.
        step: Of a run in the first.
        progress: Called as progress(done, total, name) with bytes of the first.

    Raises:
        ValueError: one of them cannot be opened, or is changed meanwhile; what is wrong is named.
    """
    if not tolerance >= 0:
        raise ValueError(f"The tolerance must be a number >= 0; got {tolerance!r}.")
    begin = time.monotonic()
    with open_checkpoint(here, step) as first, open_checkpoint(there) as second:
        found = Comparison(tolerance)
        found.notes += [
            f"The configs differ in {each}."
            for each in nearest.differences(first.config, second.config)
        ]
        for side, name in ((first, here), (second, there)):
            count = len(side.derived) + len(side.vision)
            if count:
                found.notes.append(f"{count} tensors of {name} are no weights of the model.")
        _compare_all(first, second, found, progress)
        for side in (first, second):
            if isinstance(side.source, RangedSource):
                side.source.check_unchanged()
    found.seconds = time.monotonic() - begin
    return found


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one stored tensor holds of one parameter of one layer."""

    stored: Rule
    layer: Rule | None
    """Which layer of a stack; None if the tensor holds no stack."""
    place: Rule
    """Its place in the parameter of that layer, and its shape there."""


def _pieces(checkpoint: Checkpoint) -> dict[str, list[_Piece]]:
    """By the parameter's name with the number of the layer."""
    layers: dict[str, list] = {}
    numbers: dict = {}
    for place in places(checkpoint.config):
        layers.setdefault(place.prefix, []).append(place)
        numbers[place.prefix, place.index] = place.layer_idx
    found: dict[str, list[_Piece]] = {}
    for rule in checkpoint.rules.values():
        parts = rule.leaf.split(".")
        prefix, rest = ".".join(parts[:3]), ".".join(parts[3:])
        if prefix not in layers:
            block = Rule(rule.leaf, rule.block_shape, rule.leaf, rule.index)
            found.setdefault(rule.leaf, []).append(_Piece(rule, None, block))
        elif rule.index:
            name = f"layers.{numbers[prefix, rule.index[:2]]}.{rest}"
            block = Rule(name, rule.block_shape, name, rule.index[2:])
            found.setdefault(name, []).append(_Piece(rule, None, block))
        else:
            for each in layers[prefix]:
                name = f"layers.{each.layer_idx}.{rest}"
                layer = Rule(name, rule.shape[2:], rule.leaf, each.index)
                block = Rule(name, layer.shape, name)
                found.setdefault(name, []).append(_Piece(rule, layer, block))
    return found


class _Reader:
    """Blocks of one checkpoint; what was read last is kept, for it may hold the next one too."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._last: tuple[str, np.ndarray] | None = None

    def stored(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype, or, of FP8 with a scale, in float32."""
        if self._last is None or self._last[0] != name:
            # Let go of the old one first.
            self._last = None
            source, scales = self.checkpoint.source, self.checkpoint.scales
            array = source.read(name)
            if name in scales and self.checkpoint.block is not None:
                array = fp8.dequantize(array, source.read(scales[name]), self.checkpoint.block)
            self._last = name, array
        return self._last[1]

    def block(self, piece: _Piece) -> np.ndarray:
        """As it lies in our tree."""
        array = piece.stored.to_block(self.stored(piece.stored.name))
        return array if piece.layer is None else piece.stored.cut(array, piece.layer)


def _compare_all(first: Checkpoint, second: Checkpoint, found: Comparison, progress) -> None:
    here, there = _pieces(first), _pieces(second)
    # Where one side holds whole stacks, in its order: each is then read once.
    has_stacks = any(piece.layer is not None for piece in itertools.chain(*there.values()))
    names = list(dict.fromkeys([*there, *here] if has_stacks else [*here, *there]))
    total = sum(first.source.tensors[name].nbytes for name in first.rules)
    done = 0

    def both(name: str, readers):
        return list(_compare_name(name, here.get(name, []), there.get(name, []), readers, found))

    def is_small(name: str) -> bool:
        infos = [first.source.tensors[piece.stored.name] for piece in here.get(name, [])]
        infos += [second.source.tensors[piece.stored.name] for piece in there.get(name, [])]
        return max(info.nbytes for info in infos) <= _SMALL

    def add(name: str, results) -> None:
        nonlocal done
        for size, dtypes, difference in results:
            found.blocks += bool(size)
            found.values += size
            if size:
                found.dtypes[dtypes] = found.dtypes.get(dtypes, 0) + 1
            if difference is not None:
                found.differences.append(difference)
        for piece in here.get(name, []):
            itemsize = DTYPES[first.source.tensors[piece.stored.name].dtype].itemsize
            done += math.prod(piece.place.shape) * itemsize
        progress(done, total, name)

    # Only these may be read by several threads.
    many = isinstance(first.source, HfDirectory) and isinstance(second.source, HfDirectory)
    small = [name for name in names if many and is_small(name)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        fresh = lambda name: both(name, (_Reader(first), _Reader(second)))
        for name, results in zip(small, pool.map(fresh, small)):
            add(name, results)
    readers = _Reader(first), _Reader(second)
    for name in [name for name in names if name not in set(small)]:
        add(name, both(name, readers))


def _compare_name(name, here: list[_Piece], there: list[_Piece], readers, found) -> Iterator:
    """(values compared, dtypes, difference or None) of each block of one parameter."""
    turned = len(there) > len(here)
    fine, coarse = (there, here) if turned else (here, there)
    fine_reader, coarse_reader = readers[::-1] if turned else readers
    met: dict[tuple, int] = {}
    for piece in fine:
        other = next((each for each in coarse if _holds(each.place, piece.place)), None)
        pair = (other, piece) if turned else (piece, other)
        if other is None:
            yield 0, "", _unmatched(piece, readers, "missing here" if turned else "missing there")
            continue
        count, key = math.prod(piece.place.shape), other.place.index
        if _cut_shape(other.place, piece.place) != piece.place.shape:
            met[key] = math.prod(other.place.shape)
            yield 0, "", _difference(pair, readers, "shape", piece.place)
            continue
        met[key] = met.get(key, 0) + count
        a, b = _arrays(piece, other, fine_reader, coarse_reader)
        dtypes = ", ".join(str(_dtype(each, reader)) for each, reader in zip(pair, readers))
        differing, beyond, max_abs, max_rel = count_differences(a, b, found.tolerance)
        if not differing:
            yield count, dtypes, None
            continue
        difference = _difference(pair, readers, "values", piece.place)
        yield (
            count,
            dtypes,
            dataclasses.replace(
                difference,
                size=count,
                differing=differing,
                beyond=beyond,
                max_abs=max_abs,
                max_rel=max_rel,
            ),
        )
    for other in coarse:
        if met.get(other.place.index, 0) < math.prod(other.place.shape):
            what = "missing there" if turned else "missing here"
            yield 0, "", _unmatched(other, readers, what)


def _holds(coarse: Rule, fine: Rule) -> bool:
    """Whether a block lies within another, and exists there."""
    if not coarse.covers(fine):
        return False
    kept = _kept(coarse, fine)
    return all(
        item is None or (dim < len(coarse.shape) and item < coarse.shape[dim])
        for dim, item in enumerate(kept)
    )


def _kept(coarse: Rule, fine: Rule) -> list[int | None]:
    """What the fine index picks of the dims of the coarse block."""
    mine = coarse.index + (None,) * (len(fine.index) - len(coarse.index))
    return [theirs for m, theirs in zip(mine, fine.index, strict=False) if m is None]


def _cut_shape(coarse: Rule, fine: Rule) -> tuple[int, ...]:
    kept = _kept(coarse, fine)
    picked = {dim for dim, item in enumerate(kept) if item is not None}
    return tuple(size for dim, size in enumerate(coarse.shape) if dim not in picked)


def _arrays(fine: _Piece, coarse: _Piece, fine_reader: _Reader, coarse_reader: _Reader):
    """Both blocks in one layout: as stored if that is the same, else as in our tree."""
    forms = [(each.stored.shape, each.stored.split, each.stored.order) for each in (fine, coarse)]
    if forms[0] == forms[1] and fine.layer == coarse.layer is None:
        return fine_reader.stored(fine.stored.name), coarse_reader.stored(coarse.stored.name)
    block = coarse.place.cut(coarse_reader.block(coarse), fine.place)
    return fine_reader.block(fine), block


def count_differences(
    a: np.ndarray, b: np.ndarray, tolerance: float
) -> tuple[int, int, float, float]:
    """(differing, beyond the tolerance, largest absolute, largest relative difference).

    Of arrays of one shape, any float dtypes; a value that is not finite is infinitely far from
    every other.
    """
    if a.dtype == b.dtype and a.flags.c_contiguous and b.flags.c_contiguous:
        bits = np.dtype(f"u{a.dtype.itemsize}")
        if np.array_equal(a.reshape(-1).view(bits), b.reshape(-1).view(bits)):
            return 0, 0, 0.0, 0.0
    differing = beyond = 0
    max_abs = max_rel = 0.0
    for x, y in _chunks(a, b):
        x, y = x.astype(np.float64), y.astype(np.float64)
        unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        count = int(np.count_nonzero(unequal))
        if not count:
            continue
        x, y = x[unequal], y[unequal]
        with np.errstate(all="ignore"):
            apart = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
            relative = apart / np.maximum(np.abs(x), np.abs(y))
        relative[~np.isfinite(apart)] = np.inf
        differing += count
        beyond += int(np.count_nonzero(relative > tolerance))
        max_abs, max_rel = max(max_abs, float(apart.max())), max(max_rel, float(relative.max()))
    return differing, beyond, max_abs, max_rel


def _chunks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if a.size <= _CHUNK or not a.ndim:
        yield a, b
        return
    row = a.size // len(a)
    if row > _CHUNK:
        for inner_a, inner_b in zip(a, b, strict=True):
            yield from _chunks(inner_a, inner_b)
        return
    step = _CHUNK // row
    for start in range(0, len(a), step):
        yield a[start : start + step], b[start : start + step]


def _dtype(piece: _Piece | None, reader: _Reader) -> str | None:
    if piece is None:
        return None
    return reader.checkpoint.source.tensors[piece.stored.name].dtype


def _unmatched(piece: _Piece, readers, what: str) -> Difference:
    pair = (None, piece) if what == "missing here" else (piece, None)
    return _difference(pair, readers, what, piece.place)


def _difference(pair, readers, what: str, place: Rule) -> Difference:
    items = ", ".join(":" if item is None else str(item) for item in place.index)
    here, there = pair
    return Difference(
        f"{place.name}[{items}]" if items else place.name,
        None if here is None else here.stored.name,
        None if there is None else there.stored.name,
        what,
        (
            None if here is None else here.place.shape,
            None if there is None else there.place.shape,
        ),
        (_dtype(here, readers[0]), _dtype(there, readers[1])),
    )
