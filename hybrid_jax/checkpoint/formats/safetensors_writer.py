"""Write safetensors tensor by tensor: headers first, from a plan, then the data as it comes."""

import json
import os
import pathlib

import numpy as np

from hybrid_jax.checkpoint.formats import protocol

# The limit that Hugging Face's releases of this family keep to.
SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"


class SafetensorsSink:
    """Writes `plan` into `directory`: one file, or shards with an index past `shard_bytes`.

    Tensors may come in any order; a shard's file is open from its first tensor to its last one.
    """

    def __init__(self, directory, plan, *, shard_bytes: int = SHARD_BYTES):
        self._directory = pathlib.Path(directory)
        self._plan = {info.name: info for info in plan}
        shards = _split(self._plan.values(), shard_bytes)
        self._names = _file_names(len(shards))
        self._shard_of = {info.name: i for i, shard in enumerate(shards) for info in shard}
        self._shards = shards
        self._places: dict[str, int] = {}
        self._open: dict[int, int] = {}
        self._left = [len(shard) for shard in shards]

    def write(self, name: str, array: np.ndarray) -> None:
        """Store one planned tensor."""
        info = self._plan[name]
        protocol.check_planned(info, array)
        shard = self._shard_of[name]
        if shard not in self._open:
            self._begin(shard)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        path = self._directory / self._names[shard]
        _write_at(path, self._open[shard], data.data, self._places.pop(name))
        self._left[shard] -= 1
        if not self._left[shard]:
            fd = self._open.pop(shard)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Write the index; ValueError if a planned tensor never came."""
        if any(self._left):
            self.abort()
            missing = [i for i, left in enumerate(self._left) if left]
            raise ValueError(
                f"{self._names[missing[0]]} is incomplete: a planned tensor never came."
            )
        if len(self._names) > 1:
            total = sum(info.nbytes for info in self._plan.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {n: self._names[self._shard_of[n]] for n in sorted(self._plan)},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / INDEX_NAME).write_text(text, encoding="utf-8")

    def abort(self) -> None:
        """Close whatever is open; the caller removes the directory."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _begin(self, shard: int) -> None:
        # Wide types first keeps every tensor aligned to its own size, which readers rely on.
        infos = sorted(self._shards[shard], key=lambda i: -protocol.DTYPES[i.dtype].itemsize)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        place = 0
        for info in infos:
            end = place + info.nbytes
            header[info.name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [place, end],
            }
            self._places[info.name] = place
            place = end
        raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        for info in infos:
            self._places[info.name] += 8 + len(raw)
        path = self._directory / self._names[shard]
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._open[shard] = fd
        _write_at(path, fd, memoryview(len(raw).to_bytes(8, "little") + raw), 0)


def _split(infos, shard_bytes: int) -> list[list[protocol.TensorInfo]]:
    shards: list[list[protocol.TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_at(path: pathlib.Path, fd: int, data: memoryview, place: int) -> None:
    # 64 MiB a call: Linux cuts longer writes at 2 GiB anyway, and a full disk shows sooner.
    while data:
        try:
            done = os.pwrite(fd, data[: 1 << 26], place)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while writing", str(path)) from error
        data, place = data[done:], place + done
