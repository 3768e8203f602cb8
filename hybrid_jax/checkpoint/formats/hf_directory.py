"""A Hugging Face directory: safetensors in one file or in shards that an index names."""

import json
import pathlib

import numpy as np

from hybrid_jax.checkpoint.formats.links import inside
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile
from hybrid_jax.checkpoint.formats.safetensors_writer import INDEX_NAME

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class HfDirectory:
    """All tensors of a directory, checked against the index if there is one.

    ValueError names the file and the tensor of whatever is missing, extra, outside the directory or
    not safetensors.
    """

    def __init__(self, directory):
        self.path = pathlib.Path(directory)
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = read_index(self.path)
        names = _weight_files(self.path) if weight_map is None else sorted(set(weight_map.values()))
        try:
            for name in names:
                self._add(name)
            if weight_map is not None:
                self._check_index(weight_map)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """One tensor of its stored dtype."""
        return self._files[self._file_of[name]].read(name)

    def read_many(self, names):
        """The named tensors one after the other."""
        for name in names:
            yield name, self.read(name)

    def locate(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        return str(self.path / self._file_of[name])

    def close(self) -> None:
        """Release all files."""
        for file in self._files.values():
            file.close()

    def _add(self, name: str) -> None:
        file = SafetensorsFile(inside(self.path, name))
        self._files[name] = file
        for tensor, info in file.tensors.items():
            if tensor in self._file_of:
                raise ValueError(
                    f"{self.path / name}: tensor {tensor!r} is also in "
                    f"{self._file_of[tensor]}; each must be stored once."
                )
            self._file_of[tensor] = name
            self.tensors[tensor] = info

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.path / INDEX_NAME
        for tensor, name in weight_map.items():
            if self._file_of.get(tensor) != name:
                raise ValueError(f"{index} says that {tensor!r} is in {name}, but it is not there.")
        for tensor, name in self._file_of.items():
            if tensor not in weight_map:
                raise ValueError(
                    f"{self.path / name} holds {tensor!r}, which {index} does not name."
                )
        extra = sorted(p.name for p in self.path.glob("*.safetensors") if p.name not in self._files)
        if extra:
            raise ValueError(
                f"{self.path / extra[0]} is not named in {INDEX_NAME}: its tensors would be left "
                "out. Remove the file or the index."
            )


def read_index(directory: pathlib.Path, *, need_files: bool = True) -> dict[str, str] | None:
    """Tensor -> file of the index; None without one. ValueError if it leads anywhere else."""
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
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
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path}: tensor {tensor!r} points to {name!r}; expected the plain name of a "
                "safetensors file in the same directory."
            )
        if need_files and not (directory / name).is_file():
            raise ValueError(
                f"{path}: tensor {tensor!r} should be in {name}, but there is no such file in "
                f"{directory}. Download it."
            )
    return weight_map


def _weight_files(directory: pathlib.Path) -> list[str]:
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(names) == 1:
        return names
    if names:
        raise ValueError(
            f"{directory} holds {len(names)} safetensors files ({names[0]}, ...) but no "
            f"{INDEX_NAME} that says what belongs together. Download the index."
        )
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{directory} holds only pickled weights ({pickles[0]}). Pickles can run code and are "
            "never opened here; download the safetensors files or save the model with "
            "`save_pretrained` in transformers."
        )
    raise ValueError(
        f"{directory} holds no safetensors file (`model.safetensors` or shards with an index)."
    )
