"""Prompts in which sentences with numbers are hidden in other text, counted in tokens."""

import re
from typing import NamedTuple, Protocol

import numpy as np

from hybrid_jax.config.data import Source
from hybrid_jax.data import encoding

# What RULER (arXiv 2404.06654) repeats as noise.
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
CITIES = (
    "Antananarivo", "Athens", "Bogota", "Brussels", "Cairo", "Chicago", "Colombo", "Dakar",
    "Dublin", "Hanoi", "Helsinki", "Istanbul", "Jakarta", "Lima", "Lisbon", "Melbourne", "Manila",
    "Mumbai", "Nairobi", "Oslo", "Prague", "Quito", "Reykjavik", "Riga", "Santiago", "Seoul",
    "Sofia", "Tashkent", "Tunis", "Vienna", "Warsaw", "Yangon",
)  # fmt: skip


class Prompt(NamedTuple):
    """A question about what is hidden above it."""

    ids: list[int]
    """Tokens of the haystack with the needles in it, and the question."""
    answer: list[int]
    """Tokens of the expected continuation."""
    numbers: tuple[str, ...]
    """The numbers in the answer, in the order they are asked for."""


class Encoder(Protocol):
    """Text to ids and an id to its text, as `tokenizers.Tokenizer` does."""

    def encode(self, text: str, add_special_tokens: bool = True): ...

    def decode(self, ids: list[int]) -> str: ...


class Haystack:
    """Text as tokens, with the places between its sentences."""

    def __init__(self, tokenizer: Encoder, path: str | None, longest: int):
        """The text at `path`, or a few sentences repeated until they hold `longest` tokens.

        Raises ValueError if the text holds fewer, and what `data.encoding.texts` does.
        """
        self._tokenizer = tokenizer
        if path is None:
            text = FILLER * (longest // max(1, len(self.encode(FILLER * 8)) // 8) + 2)
        else:
            text = "\n".join(encoding.texts(Source(path=path)))
        self._ids = np.array(self.encode(text))
        if len(self._ids) < longest:
            raise ValueError(
                f"The haystack {path!r} holds {len(self._ids):,} tokens; a length of {longest:,} "
                "was asked for. Give more text, or shorter lengths."
            )
        ends = {
            i for i in np.unique(self._ids) if re.search(r"[.!?\n]", tokenizer.decode([int(i)]))
        }
        self._ends = np.isin(self._ids, list(ends))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` and nothing around them."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, rng, length: int, depths, digits: int) -> Prompt:
        """`length` tokens that hide one needle at each depth, and ask for all of them.

        A needle stands behind the last sentence that ends before its depth. Raises ValueError if
        needles and question leave no room for hay.
        """
        cities = [CITIES[i] for i in rng.choice(len(CITIES), len(depths), replace=False)]
        low, high = 10 ** (digits - 1), 10**digits
        numbers = tuple(str(number) for number in rng.integers(low, high, len(depths)))
        hidden = [
            self.encode(f" The special magic {city} number is: {number}.")
            for city, number in zip(cities, numbers, strict=True)
        ]
        question = self.encode(_question(cities))
        num_hay = length - len(question) - sum(map(len, hidden))
        if num_hay < 1:
            raise ValueError(
                f"A prompt of {length} tokens has no room for {len(depths)} needles and the "
                f"question, which take {length - num_hay}; ask for longer ones."
            )
        begin = int(rng.integers(len(self._ids) - num_hay + 1))
        hay, ends = (x[begin : begin + num_hay] for x in (self._ids, self._ends))
        places = [_place(ends, depth) for depth in depths]
        ids: list[int] = []
        last = 0
        for needle in np.argsort(places, kind="stable"):
            ids += [*hay[last : places[needle]].tolist(), *hidden[needle]]
            last = places[needle]
        ids += [*hay[last:].tolist(), *question]
        return Prompt(ids, self.encode(f" {_all_of(numbers)}"), numbers)


def _question(cities) -> str:
    what, are = _all_of(cities), "numbers are" if len(cities) > 1 else "number is"
    asked = are.split()[::-1]
    return f"\nWhat {asked[0]} the special magic {what} {asked[1]}? The special magic {what} {are}:"


def _all_of(words) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _place(ends, depth: float) -> int:
    """Hay before a needle: up to the end of a sentence, unless none ends before."""
    wanted = round(depth * len(ends))
    if wanted == len(ends):
        return wanted
    before = np.flatnonzero(ends[:wanted])
    return int(before[-1]) + 1 if len(before) else 0
