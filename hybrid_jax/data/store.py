"""Tokenised documents as training sees them: any stretch of any document."""

from collections.abc import Sequence

import numpy as np
import xxhash

from hybrid_jax.data.shards import DOCUMENT, Facts, Shard, array_hash

_PLACE = np.dtype([("shard", "<i4"), ("begin", "<i8"), ("length", "<i8")])


class TokenStore:
    """Documents as ids, in order; memory-mapped, so that it costs no memory to hold."""

    def __init__(self, shards: Sequence[Shard], places: np.ndarray):
        """`places` says of each document its shard, and where in it; see `of_shards`."""
        self._shards = shards
        self._places = places

    @classmethod
    def of_shards(cls, shards: Sequence[Shard], chosen: Sequence[np.ndarray]) -> "TokenStore":
        """The documents of each shard that its `chosen` (bool [documents]) says."""
        places = []
        for number, (shard, mask) in enumerate(zip(shards, chosen, strict=True)):
            picked = shard.documents[mask]
            part = np.zeros(len(picked), _PLACE)
            part["shard"] = number
            part["begin"], part["length"] = picked["begin"], picked["length"]
            places.append(part)
        return cls(shards, np.concatenate(places) if places else np.zeros(0, _PLACE))

    @classmethod
    def of(cls, ids, offsets, learned=None) -> "TokenStore":
        """Documents in memory: document i is ids[offsets[i]:offsets[i + 1]]."""
        ids, offsets = np.asarray(ids), np.asarray(offsets, np.int64)
        documents = np.zeros(len(offsets) - 1, DOCUMENT)
        documents["begin"], documents["length"] = offsets[:-1], np.diff(offsets)
        facts = _facts_in_memory(ids, learned)
        shard = Shard(ids, learned, documents, facts)
        return cls.of_shards([shard], [np.ones(len(documents), bool)])

    @property
    def num_documents(self) -> int:
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        return int(self._places["length"].sum())

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]"""
        return self._places["length"]

    @property
    def largest_id(self) -> int:
        """No id is above this; -1 without tokens."""
        return max((shard.facts.largest for shard in self._shards), default=-1)

    def select(self, min_tokens: int = 1, max_tokens: int | None = None) -> "TokenStore":
        """The documents of so many tokens."""
        keep = self.lengths >= min_tokens
        if max_tokens is not None:
            keep &= self.lengths <= max_tokens
        return TokenStore(self._shards, self._places[keep])

    def first(self, pairs: int) -> "TokenStore":
        """The first documents with so many pairs of neighbours; the last one may be cut."""
        ends = np.cumsum(np.maximum(self.lengths - 1, 0))
        last = int(np.searchsorted(ends, pairs))
        if last >= len(ends):
            return self
        places = self._places[: last + 1].copy()
        places["length"][-1] -= ends[last] - pairs
        return TokenStore(self._shards, places)

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """The documents of one store after the other's."""
        shards: list[Shard] = []
        places = []
        for store in stores:
            moved = store._places.copy()
            moved["shard"] += len(shards)
            places.append(moved)
            shards += store._shards
        return cls(shards, np.concatenate(places))

    def read(self, document: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids, which of them are learned or None for all) of tokens begin to end of a document."""
        number, first, _ = self._places[document]
        shard = self._shards[number]
        where = slice(first + begin, first + end)
        return shard.ids[where], None if shard.learned is None else shard.learned[where]

    def fingerprint(self) -> str:
        """Equal if and only if the documents are the same, in the same order."""
        digest = xxhash.xxh3_128(np.ascontiguousarray(self._places).view(np.uint8).data)
        for shard in self._shards:
            digest.update(shard.facts.hash.encode())
        return digest.hexdigest()[:16]

    def check_vocabulary(self, vocab_size: int, what: str) -> None:
        """Raise ValueError if an id does not fit the model's embedding table."""
        if self.largest_id >= vocab_size:
            raise ValueError(
                f"{what} holds token id {self.largest_id}, but the model's "
                f"vocab_size={vocab_size} ends at {vocab_size - 1}. Use the tokenizer the model "
                "was made for, or a model with a larger vocabulary."
            )


def _facts_in_memory(ids: np.ndarray, learned) -> Facts:
    arrays = {"ids": ids} | ({} if learned is None else {"learned": learned})
    largest = int(ids.max()) if len(ids) else -1
    return Facts(0, len(ids), learned is not None, largest, array_hash(arrays), {}, [])


def unigram_entropy(targets: np.ndarray) -> float:
    """Entropy in nats of the tokens' own distribution: the best loss without any context."""
    counts = np.bincount(np.asarray(targets).reshape(-1)).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
