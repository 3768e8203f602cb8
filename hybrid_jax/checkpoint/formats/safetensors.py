"""Read one safetensors file; its header is checked in full before any data is read."""

import json
import math
import threading

import numpy as np

from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats.files import File, LocalFile
from hybrid_jax.checkpoint.formats.protocol import DTYPES, TensorInfo
from hybrid_jax.checkpoint.formats.runs import reads

# The official library refuses longer headers too; a real one has a few megabytes at most.
MAX_HEADER_BYTES = 100_000_000
_READ_BYTES = 1 << 24
# Bytes of an array; more cannot be addressed.
_MOST = 1 << 62
# What a pickle without a mark begins with: a mark, a list, a dict, a tuple or a global.
_OLD_PICKLES = (b"(", b"]", b"}", b")", b"c")


class SafetensorsFile:
    """An open safetensors file; `tensors` in order of their place in it."""

    def __init__(self, path, file: File | None = None):
        """Of a path, or of a file of any kind that `path` names; it is closed with this one."""
        self._file = LocalFile(path) if file is None else file
        self._lock = threading.Lock()
        self.bytes_read = 0
        try:
            self.tensors, self._begins = _read_header(self._file)
            self._file.check_unchanged()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """One tensor as a writable array of its stored dtype."""
        info = self.tensors[name]
        values = np.empty(info.shape, DTYPES[info.dtype])
        self._read_into(name, 0, values.reshape(-1).view(np.uint8).data)
        return values

    def read_part(self, name: str, shape: tuple[int, ...], part: Box) -> np.ndarray:
        """A part of one tensor, seen in `shape` (of as many values), in memory of its own.

        Bytes between runs of wanted ones are read too where they are few. Several threads may read.
        """
        dtype = DTYPES[self.tensors[name].dtype]
        values = np.empty(part.shape or (1,), dtype)
        plan = reads(shape, part, dtype.itemsize, self._file.gap_bytes, _READ_BYTES)
        for offset, nbytes, where, wanted, strides, is_dense in plan:
            if is_dense:
                run = values[where].reshape(-1).view(np.uint8)
                self._read_into(name, offset, run.data)
            else:
                span = np.empty(nbytes, np.uint8)
                self._read_into(name, offset, span.data)
                values[where] = np.ndarray(wanted, dtype, span.data, strides=strides)
        return values.reshape(part.shape)

    @property
    def ahead_bytes(self) -> int:
        """How much to ask for before it is needed."""
        return self._file.ahead_bytes

    def check_unchanged(self) -> None:
        """ValueError if the file is not as it was when it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _read_into(self, name: str, offset: int, target: memoryview) -> None:
        got = self._file.read_into(self._begins[name] + offset, target)
        with self._lock:
            self.bytes_read += got
        if got < len(target):
            nbytes = self.tensors[name].nbytes
            raise ValueError(
                f"{self._file.name}: tensor {name!r} ends after {offset + got} of {nbytes} bytes; "
                "the file has shrunk since it was opened. Download it again."
            )


def _read_header(file: File) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    path, size = file.name, file.size
    head = _bytes(file, 0, 9)
    _refuse_pickle(head, _bytes(file, max(size - 1, 0), 1), path)
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
    header = _parse(_bytes(file, 8, length), path)
    _check_metadata(header.pop("__metadata__", None), path)
    spans = {name: _entry(name, value, path) for name, value in header.items()}
    ordered = sorted(spans, key=lambda name: (spans[name][1], spans[name][2]))
    _check_layout(ordered, spans, size - 8 - length, path)
    infos = {name: spans[name][0] for name in ordered}
    return infos, {name: 8 + length + spans[name][1] for name in ordered}


def _bytes(file: File, offset: int, count: int) -> bytes:
    """What there is of a range."""
    target = bytearray(count)
    return bytes(target[: file.read_into(offset, memoryview(target))])


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


def unique(pairs) -> dict:
    """A JSON object of which no key stands twice; ValueError otherwise."""
    result: dict = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _whole(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no whole number here")
    return int(digits)


def _no_constant(word: str):
    raise ValueError(f"{word} is not JSON")


def _parse(raw: bytes, path) -> dict:
    try:
        # Python takes more than JSON allows, and other readers would understand something else.
        if raw[:1] != b"{":
            raise ValueError("it does not begin with an object")
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=_whole,
            parse_constant=_no_constant,
        )
        # Half a pair of surrogates has no bytes: nothing could print or write the name.
        "".join(header).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header is bad: {error}."
        ) from error
    return header


def _check_metadata(value, path) -> None:
    texts = {} if value is None else value
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{path}: __metadata__ must map names to texts; got {value!r:.200}.")


def _entry(name: str, value, path) -> tuple[TensorInfo, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where} must have dtype, shape and data_offsets in the header; got {value!r:.200}."
        )
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise ValueError(
            f"{where} has dtype {value['dtype']!r:.200}; readable are {', '.join(DTYPES)}."
        )
    shape, offsets = value["shape"], value["data_offsets"]
    itemsize = DTYPES[value["dtype"]].itemsize
    # A size of 0 would hide what no array can have beside it.
    if not _is_sizes(shape) or math.prod(size or 1 for size in shape) * itemsize > _MOST:
        raise ValueError(
            f"{where} has shape {shape!r:.200}; expected sizes >= 0 of an array that can be."
        )
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{where} has data_offsets {offsets!r:.200}; expected two whole numbers >= 0."
        )
    begin, end = offsets
    nbytes = math.prod(shape) * itemsize
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
