"""What every container offers: named tensors, read and written one by one."""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from hybrid_jax.checkpoint import digests
from hybrid_jax.checkpoint.boxes import Box

# Tags of the safetensors format; the wider formats (4 and 6 bits, E8M0) are in no release we read.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Name, dtype tag (safetensors spelling) and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Source(typing.Protocol):
    """An open checkpoint directory."""

    tensors: dict[str, TensorInfo]
    """Everything stored, in the order in which reading is cheapest."""

    @property
    def bytes_read(self) -> int:
        """Of tensors, in this process so far."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own. ValueError names the file when it cannot be read."""

    def read_many(self, names: typing.Iterable[str]) -> typing.Iterator[tuple[str, np.ndarray]]:
        """The named tensors, each once; holds a few of them at a time.

        In the order given, if that is the order of `tensors`.
        """

    def locate(self, name: str) -> str:
        """The file that holds a tensor, for messages."""

    def close(self) -> None:
        """Release all files."""


@typing.runtime_checkable
class RangedSource(Source, typing.Protocol):
    """One that reads a part of a tensor without the rest; of others a part costs the whole."""

    def read_part(self, name: str, shape: tuple[int, ...], part: Box) -> np.ndarray:
        """A part of a tensor seen in `shape`, with as many values; several threads may read."""

    def check_unchanged(self) -> None:
        """ValueError if a file is not as it was when it was opened."""


class Unit(typing.Protocol):
    """A piece of a checkpoint directory that appears whole or not at all."""

    @property
    def number(self) -> int:
        """Among those of its layout, from 0."""

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Its tensors, in the order in which they lie there."""


class Written(typing.NamedTuple):
    """What a unit is, for the manifest; digests were made of the bytes as they passed."""

    files: Mapping[str, tuple[int, str]]
    """Size in bytes and xxh3-128 by path below the directory."""
    arrays: Mapping[str, digests.Array]
    """By the tensor's name."""


class Layout(typing.Protocol):
    """Where the planned tensors of a checkpoint directory go, in units, and what says so."""

    @property
    def units(self) -> typing.Sequence[Unit]:
        """In order of their numbers."""

    def write(
        self, directory: pathlib.Path, number: int, tensors: typing.Iterator[np.ndarray]
    ) -> Written:
        """Write one unit, forced to the medium, over what an earlier attempt has left of it.

        `tensors` come in the order of its `infos`. OSError when the medium is full.
        """

    def finish(self, directory: pathlib.Path, arrays: Mapping[str, digests.Array]) -> None:
        """Write the index, when all units are there."""


def cut(infos: typing.Iterable[TensorInfo], limit: int) -> list[tuple[TensorInfo, ...]]:
    """Tensors in groups of at most `limit` bytes, or of one that is larger; never none at all."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if groups[-1] and filled + info.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    return [tuple(group) for group in groups]


def check_planned(info: TensorInfo, array: np.ndarray) -> None:
    """Refuse an array that is not what was planned; headers are written before the data."""
    if TAGS.get(array.dtype) != info.dtype or array.shape != info.shape:
        raise ValueError(
            f"Tensor {info.name!r} was planned as {info.dtype}{list(info.shape)} but came as "
            f"{array.dtype}{list(array.shape)}."
        )
