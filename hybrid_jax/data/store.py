"""Tokenised documents on disk: one flat array of ids and the place where each document begins."""

import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from hybrid_jax.data import tokenizer as tokenizer_lib
from hybrid_jax.data.documents import Document

_ENCODED_AT_A_TIME = 256


class TokenStore(NamedTuple):
    """Documents as ids, end to end; each closes with the end-of-document id."""

    ids: np.ndarray
    """uint16 or uint32 [tokens]; may be memory-mapped."""
    offsets: np.ndarray
    """int64 [documents + 1]; document i is ids[offsets[i]:offsets[i + 1]]."""

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def fingerprint(self) -> str:
        """Hash of every id and offset: equal if and only if the data is the same."""
        digest = hashlib.sha256()
        for array in (self.ids.astype(np.uint32, copy=False), self.offsets):
            for begin in range(0, len(array), 1 << 22):
                digest.update(np.ascontiguousarray(array[begin : begin + (1 << 22)]).tobytes())
        return digest.hexdigest()[:16]

    def save(self, directory, name: str) -> None:
        """Write DIR/NAME.ids.npy, then DIR/NAME.json, whose presence says that all is there."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / f"{name}.ids.npy", self.ids)
        np.save(directory / f"{name}.offsets.npy", self.offsets)
        facts = {"documents": self.num_documents, "tokens": len(self.ids)}
        (directory / f"{name}.json").write_text(json.dumps(facts) + "\n")

    @classmethod
    def load(cls, directory, name: str) -> "TokenStore":
        """Memory-map what `save` wrote. Raises ValueError if it is missing or cut short."""
        directory = pathlib.Path(directory)
        try:
            facts = json.loads((directory / f"{name}.json").read_text())
            if not isinstance(facts, dict) or not {"tokens", "documents"} <= facts.keys():
                raise ValueError(f"{name}.json must give `tokens` and `documents`")
            ids = np.load(directory / f"{name}.ids.npy", mmap_mode="r", allow_pickle=False)
            offsets = np.load(directory / f"{name}.offsets.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"The token store {directory / name} is missing or damaged ({error}). "
                "Delete the directory to tokenise the text again."
            ) from error
        if (len(ids), len(offsets) - 1) != (facts["tokens"], facts["documents"]):
            raise ValueError(
                f"The token store {directory / name} does not match its own record. Delete the "
                "directory to tokenise the text again."
            )
        return cls(ids, offsets)

    def check_vocabulary(self, vocab_size: int, what: str) -> None:
        """Raise ValueError if an id does not fit the model's embedding table."""
        largest = int(self.ids.max())
        if largest >= vocab_size:
            where = int(np.searchsorted(self.offsets, np.argmax(self.ids), side="right")) - 1
            raise ValueError(
                f"{what}: document {where} holds token id {largest}, but the model's "
                f"vocab_size={vocab_size} ends at {vocab_size - 1}. Use the tokenizer the model "
                "was made for, or a model with a larger vocabulary."
            )


def tokenise(
    documents: list[Document], tokenizer: tokenizer_lib.Tokenizer, report=None
) -> TokenStore:
    """Encode `documents` in order; `report(done, all)` is called now and then."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    pieces, lengths = [], []
    for begin in range(0, len(documents), _ENCODED_AT_A_TIME):
        texts = [document.text for document in documents[begin : begin + _ENCODED_AT_A_TIME]]
        for encoded in tokenizer.encode_batch(texts):
            pieces.append(np.array([*encoded, tokenizer.end_id], dtype))
            lengths.append(len(encoded) + 1)
        if report is not None:
            report(min(begin + _ENCODED_AT_A_TIME, len(documents)), len(documents))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    return TokenStore(ids, offsets)


def unigram_entropy(targets: np.ndarray) -> float:
    """Entropy in nats of the tokens' own distribution: the best loss without any context."""
    counts = np.bincount(np.asarray(targets).reshape(-1)).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
