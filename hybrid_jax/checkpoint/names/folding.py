"""Many names as few: those that differ only in numbers between dots become one pattern."""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Folded:
    """Names of one pattern."""

    pattern: str
    """`model.layers.{0..79}.input_layernorm.weight`; a lone name stays as it is."""
    names: tuple[str, ...]
    """All of them, in order."""


def fold(names: Iterable[str], kind=lambda name: None) -> list[Folded]:
    """Patterns by first appearance; names whose `kind`, anything hashable, differs stay apart."""
    groups: dict[Hashable, list[tuple[str, tuple[int, ...]]]] = {}
    for name in names:
        parts = name.split(".")
        places = tuple(i for i, part in enumerate(parts) if part.isascii() and part.isdecimal())
        skeleton = tuple("" if i in places else part for i, part in enumerate(parts))
        numbers = tuple(int(parts[i]) for i in places)
        groups.setdefault((skeleton, places, kind(name)), []).append((name, numbers))
    return [
        Folded(
            _pattern(key[0], key[1], [numbers for _, numbers in found]),  # type: ignore[index]
            tuple(name for name, _ in found),
        )
        for key, found in groups.items()
    ]


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers as text: `0..6`, `7,15..79` (in equal steps), `0..6,8..14,…,72..78`."""
    found = sorted(set(numbers))
    steps = {b - a for a, b in itertools.pairwise(found)}
    if len(found) > 2 and len(steps) == 1 and steps != {1}:
        return f"{found[0]},{found[1]}..{found[-1]}"
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return ",".join(texts if len(texts) <= 4 else [*texts[:2], "…", texts[-1]])


def _pattern(skeleton: Sequence[str], places: Sequence[int], numbers: list[tuple[int, ...]]) -> str:
    parts = list(skeleton)
    columns = [set(column) for column in zip(*numbers)]
    for place, column in zip(places, columns):
        text = spans(column)
        parts[place] = text if len(column) == 1 else f"{{{text}}}"
    whole = ".".join(parts)
    # Some of the grid that the pattern spans are not among the names.
    count = math.prod(len(column) for column in columns)
    return whole if count == len(numbers) else f"{whole} ({len(numbers)} of {count})"
