"""Named shapes of lightning attention, shared by tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    """Sizes of one call: batch, tokens a row, heads, and the two head sizes."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int


CASES = {
    # Two whole chunks and a part of one, key and value sizes apart.
    "odd": Case(batch=2, length=149, heads=4, key_dim=8, value_dim=5),
    # One training step of the quickstart preset, and one of its longer prefills.
    "quickstart": Case(batch=4, length=1024, heads=4, key_dim=64, value_dim=64),
    "quickstart-16k": Case(batch=1, length=16384, heads=4, key_dim=64, value_dim=64),
    # The head size of MiniMax-Text-01 and its relatives.
    "heads-128": Case(batch=1, length=4096, heads=8, key_dim=128, value_dim=128),
}
