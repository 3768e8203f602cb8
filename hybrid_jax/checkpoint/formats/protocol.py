"""What every container offers: named tensors, read and written one by one."""

import dataclasses
import math
import typing

import ml_dtypes
import numpy as np

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
        """The named tensors, each once, in any order; holds a few of them at a time."""

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


class Sink(typing.Protocol):
    """A checkpoint directory being written; every planned tensor must come exactly once."""

    def write(self, name: str, array: np.ndarray) -> None:
        """Store one planned tensor. OSError when the medium is full."""

    def close(self) -> None:
        """Finish all files and force them to the medium. ValueError if a tensor never came."""

    def abort(self) -> None:
        """Give up: release what is open. The caller removes the directory."""


def check_planned(info: TensorInfo, array: np.ndarray) -> None:
    """Refuse an array that is not what was planned; headers are written before the data."""
    if TAGS.get(array.dtype) != info.dtype or array.shape != info.shape:
        raise ValueError(
            f"Tensor {info.name!r} was planned as {info.dtype}{list(info.shape)} but came as "
            f"{array.dtype}{list(array.shape)}."
        )
