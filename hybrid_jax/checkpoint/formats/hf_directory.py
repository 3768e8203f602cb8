"""A Hugging Face directory: safetensors in one file or in shards that an index names."""

import collections
import concurrent.futures
import json
import os
import pathlib

import numpy as np

from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile, unique
from hybrid_jax.checkpoint.formats.safetensors_writer import INDEX_NAME

SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files opened at a time.
_OPENING = 16


class HfDirectory:
    """All tensors of a directory, checked against the index if there is one.

    ValueError names the file and the tensor of whatever is missing, extra, outside the directory or
    not safetensors, and of what is read from a file that has changed since it was opened.
    """

    def __init__(self, directory):
        """Of a path, or of a `files.Folder`."""
        local = isinstance(directory, str | os.PathLike)
        self.folder: Folder = LocalFolder(directory) if local else directory
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = read_index(self.folder)
        present = self.folder.names()
        if weight_map is None:
            names = _weight_files(self.folder, present)
        else:
            names = _named_files(self.folder, present, weight_map)
        try:
            self._open(names)
            for name in names:
                self._add(name)
            if weight_map is not None:
                self._check_index(weight_map)
        except BaseException:
            self.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Of tensors, in this process so far."""
        return sum(file.bytes_read for file in self._files.values())

    def read(self, name: str) -> np.ndarray:
        """One tensor of its stored dtype."""
        return self._files[self._file_of[name]].read(name)

    def read_part(self, name: str, shape: tuple[int, ...], part: Box) -> np.ndarray:
        """A part of a tensor, seen in `shape`; several threads may read."""
        return self._files[self._file_of[name]].read_part(name, shape, part)

    def read_many(self, names):
        """The named tensors one after the other; from storage, some are asked for ahead."""
        names = list(names)
        ahead = max((file.ahead_bytes for file in self._files.values()), default=0)
        yield from self._read_ahead(names, ahead) if ahead else ((n, self.read(n)) for n in names)
        # Asking costs a request there: for the files that were read, and no others.
        read = {self._file_of[name] for name in names} if ahead else set(self._files)
        _check_unchanged([self._files[name] for name in read])

    def locate(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        return self.folder.where(self._file_of[name])

    def check_unchanged(self) -> None:
        """ValueError if a file is not as it was when it was opened."""
        _check_unchanged(self._files.values())

    def close(self) -> None:
        """Release all files."""
        for file in self._files.values():
            file.close()

    def _read_ahead(self, names: list[str], most_bytes: int):
        """With so many bytes at once under way or waiting, or one tensor that is larger."""
        left, sizes = collections.deque(names), self.tensors
        ahead: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()
        held = 0
        with concurrent.futures.ThreadPoolExecutor(_OPENING) as pool:
            try:
                while left or ahead:
                    while left and (not ahead or held + sizes[left[0]].nbytes <= most_bytes):
                        name = left.popleft()
                        held += sizes[name].nbytes
                        ahead.append((name, pool.submit(self.read, name)))
                    name, future = ahead.popleft()
                    held -= sizes[name].nbytes
                    yield name, future.result()
                    # Or it would be kept until the next one has come.
                    del future
            finally:
                for _, future in ahead:
                    future.cancel()

    def _open(self, names: list[str]) -> None:
        def one(name: str) -> None:
            file = SafetensorsFile(self.folder.where(name), self.folder.open(name))
            self._files[name] = file

        # Headers of hundreds of shards, each a request or two to a store.
        with concurrent.futures.ThreadPoolExecutor(_OPENING) as pool:
            for opening in [pool.submit(one, name) for name in names]:
                opening.result()

    def _add(self, name: str) -> None:
        for tensor, info in self._files[name].tensors.items():
            if tensor in self._file_of:
                raise ValueError(
                    f"{self.folder.where(name)}: tensor {tensor!r} is also in "
                    f"{self._file_of[tensor]}; each must be stored once."
                )
            self._file_of[tensor] = name
            self.tensors[tensor] = info

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.folder.where(INDEX_NAME)
        for tensor, name in weight_map.items():
            if self._file_of.get(tensor) != name:
                raise ValueError(f"{index} says that {tensor!r} is in {name}, but it is not there.")
        for tensor, name in self._file_of.items():
            if tensor not in weight_map:
                raise ValueError(
                    f"{self.folder.where(name)} holds {tensor!r}, which {index} does not name."
                )


def _check_unchanged(files) -> None:
    with concurrent.futures.ThreadPoolExecutor(_OPENING) as pool:
        list(pool.map(SafetensorsFile.check_unchanged, files))


def read_index(folder: Folder) -> dict[str, str] | None:
    """Tensor -> file of the index, None without one; ValueError if it leads anywhere else.

    Whether the files are there is not asked.
    """
    path = folder.where(INDEX_NAME)
    try:
        raw = folder.read_bytes(INDEX_NAME)
    except FileNotFoundError:
        return None
    try:
        index = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON with a `weight_map`: {error}.") from error
    if not isinstance(index, dict) or "weight_map" not in index:
        raise ValueError(f"{path} must be a JSON object with a `weight_map`; got {index!r:.80}.")
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: `weight_map` must map tensor names to files; got {weight_map!r:.80}."
        )
    for tensor, name in weight_map.items():
        # A plain file name only: an index comes from the net and must not reach around the disk.
        plain = isinstance(name, str) and name == pathlib.PurePath(name).name and "\\" not in name
        if not plain or not name.endswith(SUFFIX):
            raise ValueError(
                f"{path}: tensor {tensor!r} points to {name!r:.200}; expected the plain name of a "
                "safetensors file in the same directory."
            )
    return weight_map


def _named_files(folder: Folder, present: list[str], weight_map: dict[str, str]) -> list[str]:
    """The files of an index, which must be all that there are."""
    index, there = folder.where(INDEX_NAME), set(present)
    for tensor, name in weight_map.items():
        if name not in there:
            raise ValueError(
                f"{index}: tensor {tensor!r} should be in {name}, but there is no such file in "
                f"{folder}. Download it."
            )
    names = sorted(set(weight_map.values()))
    extra = sorted({name for name in there if name.endswith(SUFFIX)} - set(names))
    if extra:
        raise ValueError(
            f"{folder.where(extra[0])} is not named in {INDEX_NAME}: its tensors would be left "
            "out. Remove the file or the index."
        )
    return names


def _weight_files(folder: Folder, present: list[str]) -> list[str]:
    names = [name for name in present if name.endswith(SUFFIX)]
    if len(names) == 1:
        return names
    if names:
        raise ValueError(
            f"{folder} holds {len(names)} safetensors files ({names[0]}, ...) but no "
            f"{INDEX_NAME} that says what belongs together. Download the index."
        )
    pickles = [name for name in present if name.endswith(_PICKLES)]
    if pickles:
        raise ValueError(
            f"{folder} holds only pickled weights ({pickles[0]}). Pickles can run code and are "
            "never opened here; download the safetensors files or save the model with "
            "`save_pretrained` in transformers."
        )
    raise ValueError(
        f"{folder} holds no safetensors file (`model.safetensors` or shards with an index)."
    )
