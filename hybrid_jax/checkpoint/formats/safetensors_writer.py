"""Write safetensors files: headers from a plan, then the tensors in the order they lie in."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import xxhash

from hybrid_jax.checkpoint import atomic, digests
from hybrid_jax.checkpoint.formats import protocol

# The limit that Hugging Face's releases of this family keep to.
SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file."""

    number: int
    name: str
    infos: tuple[protocol.TensorInfo, ...]
    """Tensors in the order they lie in."""
    header: bytes
    begins: Mapping[str, int]
    """First byte of each tensor in the file."""
    size: int
    """Bytes of the file."""


class SafetensorsLayout:
    """One file, or shards of at most `shard_bytes` of tensors with an index; a unit is a file."""

    def __init__(self, infos, *, shard_bytes: int = SHARD_BYTES):
        groups = protocol.cut(infos, shard_bytes)
        self.units = [_shard(i, len(groups), group) for i, group in enumerate(groups)]

    def write(
        self, directory: pathlib.Path, number: int, tensors: Iterator[np.ndarray]
    ) -> protocol.Written:
        """Write one file; it has another name until it is whole."""
        shard = self.units[number]
        path = directory / shard.name
        draft = path.with_name(f"{shard.name}.part")
        whole, arrays = xxhash.xxh3_128(shard.header), {}
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_at(draft, fd, memoryview(shard.header), 0)
            for info, array in zip(shard.infos, tensors, strict=True):
                protocol.check_planned(info, array)
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                whole.update(data.data)
                arrays[info.name] = digests.whole(info.name, array)
                write_at(draft, fd, data.data, shard.begins[info.name])
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(draft, path)
        atomic.sync_names(directory)
        return protocol.Written({shard.name: (shard.size, whole.hexdigest())}, arrays)

    def reserve(self, directory: pathlib.Path, number: int) -> None:
        """Make a file of the final size with its header, for several to write the tensors.

        What an earlier start has left of it stays.
        """
        shard = self.units[number]
        path = directory / shard.name
        path.touch()
        with opened(path) as fd:
            os.truncate(fd, shard.size)
            write_at(path, fd, memoryview(shard.header), 0)

    def finish(self, directory: pathlib.Path, arrays: Mapping[str, digests.Array]) -> None:
        """Write the index, if there are several files."""
        if len(self.units) == 1:
            return
        named = {info.name: shard.name for shard in self.units for info in shard.infos}
        total = sum(info.nbytes for shard in self.units for info in shard.infos)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: named[name] for name in sorted(named)},
        }
        atomic.write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def opened(path: pathlib.Path):
    """The descriptor of a file to write into, which is on the medium in the end."""
    fd = os.open(path, os.O_WRONLY)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(path: pathlib.Path, fd: int, data: memoryview, place: int) -> None:
    """Write bytes to a place in an open file; OSError names the file."""
    # 64 MiB a call: Linux cuts longer writes at 2 GiB anyway, and a full disk shows sooner.
    while data:
        try:
            done = os.pwrite(fd, data[: 1 << 26], place)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while writing", str(path)) from error
        data, place = data[done:], place + done


def _shard(number: int, of: int, group: tuple[protocol.TensorInfo, ...]) -> Shard:
    # Wide types first keeps every tensor aligned to its own size, which readers rely on.
    infos = tuple(sorted(group, key=lambda info: -protocol.DTYPES[info.dtype].itemsize))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    places, place = {}, 0
    for info in infos:
        end = place + info.nbytes
        entries[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [place, end],
        }
        places[info.name], place = place, end
    raw = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    name = "model.safetensors" if of == 1 else f"model-{number + 1:05d}-of-{of:05d}.safetensors"
    begins = {tensor: len(header) + begin for tensor, begin in places.items()}
    return Shard(number, name, infos, header, begins, len(header) + place)
