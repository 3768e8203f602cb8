"""Read one safetensors file; its header is checked in full before any data is read."""

import json
import math
import os
import pathlib

import numpy as np

from hybrid_jax.checkpoint.formats.protocol import DTYPES, TensorInfo

# The official library refuses longer headers too; a real one has a few megabytes at most.
MAX_HEADER_BYTES = 100_000_000
_READ_BYTES = 1 << 26
# What a pickle without a mark begins with: a mark, a list, a dict, a tuple or a global.
_OLD_PICKLES = (b"(", b"]", b"}", b")", b"c")


class SafetensorsFile:
    """An open safetensors file; `tensors` in order of their place in it.

    Tensors are read with pread into memory of their own, not mapped: pages of a mapped file count
    as the process's memory, and a file that shrinks meanwhile must be an error, not a SIGBUS.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `close`)
        try:
            self.tensors, self._begins = _read_header(self._file, self.path)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """One tensor as a writable array of its stored dtype."""
        info = self.tensors[name]
        buffer = np.empty(info.nbytes, np.uint8)
        done = 0
        while done < info.nbytes:
            target = buffer.data[done : done + _READ_BYTES]
            got = os.preadv(self._file.fileno(), [target], self._begins[name] + done)
            if not got:
                raise ValueError(
                    f"{self.path}: tensor {name!r} ends after {done} of {info.nbytes} bytes; the "
                    "file has shrunk since it was opened. Download it again."
                )
            done += got
        return buffer.view(DTYPES[info.dtype]).reshape(info.shape)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _read_header(file, path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    size = os.fstat(file.fileno()).st_size
    head = file.read(9)
    _refuse_pickle(head, _last_byte(file, size), path)
    head = head[:8]
    if len(head) < 8:
        raise ValueError(
            f"{path} is not a safetensors file: expected an 8-byte header length, got {size} bytes "
            "in all. It is truncated or empty; download it again."
        )
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} is not a safetensors file: its header would be {length} bytes long, the limit "
            f"is {MAX_HEADER_BYTES}."
        )
    if 8 + length > size:
        raise ValueError(
            f"{path} is truncated: its header should end at byte {8 + length}, the file has "
            f"{size}. Download it again."
        )
    file.seek(8)
    header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    spans = {name: _entry(name, value, path) for name, value in header.items()}
    ordered = sorted(spans, key=lambda name: (spans[name][1], spans[name][2]))
    _check_layout(ordered, spans, size - 8 - length, path)
    infos = {name: spans[name][0] for name in ordered}
    return infos, {name: 8 + length + spans[name][1] for name in ordered}


def _last_byte(file, size: int) -> bytes:
    return os.pread(file.fileno(), 1, max(size - 1, 0))


def _refuse_pickle(head: bytes, last: bytes, path) -> None:
    # Zip archives are torch.save's format since 1.6; 0x80 opens a bare pickle of protocol 2 to 5,
    # and a safetensors file whose header happens to be 640 bytes long, which goes on with "{".
    bare = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    # Protocols 0 and 1 have no mark: text of opcodes, which read as a length is beyond any header,
    # up to a full stop.
    length = int.from_bytes(head[:8], "little")
    old = head[:1] in _OLD_PICKLES and last == b"." and length > MAX_HEADER_BYTES
    if head.startswith(b"PK\x03\x04") or (bare and head[8:9] != b"{") or old:
        raise ValueError(
            f"{path} is a PyTorch pickle, whatever its name says, not safetensors. Pickles can run "
            "code and are never opened here; ask for the safetensors files of this model, or save "
            "it with `save_pretrained` in transformers."
        )


def _unique(pairs) -> dict:
    result: dict = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _parse(raw: bytes, path) -> dict:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header is bad: {error}."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"{path} is not a safetensors file: its header is a JSON {type(header).__name__}, "
            "expected an object."
        )
    return header


def _entry(name: str, value, path) -> tuple[TensorInfo, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where} must have dtype, shape and data_offsets in the header; got {value!r}."
        )
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise ValueError(f"{where} has dtype {value['dtype']!r}; readable are {', '.join(DTYPES)}.")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_sizes(shape):
        raise ValueError(f"{where} has shape {shape!r}; expected a list of whole numbers >= 0.")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has data_offsets {offsets!r}; expected two whole numbers >= 0.")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[value["dtype"]].itemsize
    if end - begin != nbytes:
        raise ValueError(
            f"{where} is {value['dtype']}{shape}, {nbytes} bytes, but its data_offsets {offsets} "
            f"span {end - begin}."
        )
    return TensorInfo(name, value["dtype"], tuple(shape)), begin, end


def _is_sizes(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(type(item) is int and item >= 0 for item in value)
    )


def _check_layout(ordered, spans, data_bytes: int, path) -> None:
    """Tensors must tile the data: no gap, no overlap, nothing behind the last one."""
    place = 0
    for name in ordered:
        _, begin, end = spans[name]
        if end > data_bytes:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} should end at byte {end} of the data, which "
                f"has {data_bytes}. Download it again."
            )
        if begin != place:
            what = "overlaps the tensor before it" if begin < place else "leaves a hole before it"
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data and {what}; expected "
                f"{place}."
            )
        place = end
    if place != data_bytes:
        raise ValueError(
            f"{path} has {data_bytes - place} bytes behind its last tensor; the file is damaged."
        )
