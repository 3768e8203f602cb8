"""A prepared source on disk, opened: what is learned from, what is held out, and what it is."""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from hybrid_jax.data import shards
from hybrid_jax.data.store import TokenStore
from hybrid_jax.data.tokenizer import Tokenizer

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `hybrid-jax data prepare` made."""

    path: pathlib.Path
    summary: dict
    """dataset.json"""
    training: TokenStore
    heldout: TokenStore

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer.json")

    @property
    def num_bytes(self) -> int:
        """Of all ids."""
        return self.summary["tokens"] * (2 if self.tokenizer.vocab_size <= 1 << 16 else 4)

    def verify(self) -> None:
        """Read everything. Raises ValueError naming what is damaged."""
        for number in range(self.summary["shards"]):
            shards.verify(self.path / "shards", number)


def is_dataset(path) -> bool:
    """Whether `path` is the directory of a prepared source, finished or not."""
    return (pathlib.Path(path).expanduser() / "plan.json").is_file()


def read_summary(path) -> dict:
    """dataset.json of a prepared source. Raises ValueError if it is not there or cannot be read."""
    try:
        summary = json.loads((pathlib.Path(path) / "dataset.json").read_text(encoding="utf-8"))
        version = summary["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"dataset.json cannot be read: {error}") from error
    if version != FORMAT:
        raise ValueError(f"format {version}, but this version reads {FORMAT}")
    return summary


def open_dataset(path) -> Dataset:
    """Open a prepared source. Raises ValueError if it is unfinished or damaged."""
    path = pathlib.Path(path).expanduser()
    again = "Prepare it again: the same command goes on where it stopped; or delete the directory."
    if not is_dataset(path):
        raise ValueError(
            f"{path} holds no prepared data; `hybrid-jax data prepare SOURCE --out {path}` makes "
            "some."
        )
    if not (path / "dataset.json").is_file():
        raise ValueError(f"{path} is not finished. {again}")
    try:
        summary = read_summary(path)
        place = path / "shards"
        opened = [shards.load(place, number) for number in range(summary["shards"])]
        kept = np.load(path / "kept.npy", allow_pickle=False)
        if len(kept) != sum(len(shard.documents) for shard in opened):
            raise ValueError("kept.npy does not match the shards")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(
            f"The prepared data {path} is missing something or damaged ({error}). Delete the "
            "directory to tokenise the text again."
        ) from error
    parts = np.split(kept, np.cumsum([len(shard.documents) for shard in opened])[:-1])
    heldout = [shard.documents["heldout"] for shard in opened]
    return Dataset(
        path,
        summary,
        TokenStore.of_shards(opened, [k & ~h for k, h in zip(parts, heldout, strict=True)]),
        TokenStore.of_shards(opened, [k & h for k, h in zip(parts, heldout, strict=True)]),
    )
