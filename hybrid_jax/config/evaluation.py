"""What each evaluation measures: lengths, depths, numbers of pairs, samples."""

import dataclasses

from hybrid_jax.config.layers import require_positive


def _require_sizes(config, *names: str) -> None:
    """ValueError unless every named field is a tuple of whole numbers above zero, each once."""
    for name in names:
        values = getattr(config, name)
        whole = all(type(value) is int and value > 0 for value in values)
        if not values or not whole or len(set(values)) < len(values):
            raise ValueError(
                f"{type(config).__name__}.{name} must be different whole numbers > 0; got "
                f"{list(values)}."
            )


def _require_depths(config) -> None:
    depths = config.depths
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"{type(config).__name__}.depths must be numbers in [0, 1]; got {list(depths)}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Loss on text by the length of the context, and by position in the longest."""

    text: str | None = None
    """A file, a directory (searched recursively) or a glob; None: what the run has held out."""
    pattern: str = "*"
    """Names of the files to take from a directory, e.g. '*.py'."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    """Tokens a window; the same tokens are predicted at each length."""
    tokens: int = 65536
    """Predicted tokens at most; whole documents, in order."""

    def __post_init__(self):
        _require_sizes(self, "lengths")
        require_positive(self, "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
    """A sentence with a number, hidden at each depth of a haystack of each length, is asked for."""

    haystack: str | None = None
    """A file, a directory or a glob with text to hide it in; None: a few sentences, repeated."""
    lengths: tuple[int, ...] = (256, 512, 1024)
    """Tokens of the whole prompt, question included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the sentence stands: 0 is the beginning of the haystack, 1 its end."""
    samples: int = 4
    """Prompts of each length and depth."""
    digits: int = 7
    """Digits of the number."""

    def __post_init__(self):
        _require_sizes(self, "lengths")
        _require_depths(self)
        require_positive(self, "samples", "digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiNeedle:
    """Several such sentences at random depths, and all of their numbers are asked for at once."""

    haystack: str | None = None
    """As for one needle."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of the whole prompt, question included."""
    counts: tuple[int, ...] = (2, 4)
    """Sentences in a haystack."""
    samples: int = 8
    """Prompts of each length and count."""
    digits: int = 7
    """Digits of a number."""

    def __post_init__(self):
        _require_sizes(self, "lengths", "counts")
        require_positive(self, "samples", "digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenNeedle:
    """A key and its value among random tokens, for models that know no language or no tokenizer."""

    lengths: tuple[int, ...] = (128, 256, 512)
    """Tokens a row, question included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the key stands: 0 is the beginning of the filler, 1 its end."""
    samples: int = 16
    """Rows of each length and depth."""
    value_length: int = 2
    """Tokens of the value."""
    vocab_size: int | None = None
    """Ids to draw from, the model's first ones; None: all."""

    def __post_init__(self):
        _require_sizes(self, "lengths")
        _require_depths(self)
        require_positive(self, "samples", "value_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """Multi-query associative recall: pairs of a key and its value, then questions for them."""

    pairs: tuple[int, ...] = (4, 8, 16, 32)
    """Pairs a row."""
    length: int = 128
    """Tokens a row; all behind the pairs are questions."""
    rows: int = 64
    """Rows of each number of pairs."""
    vocab_size: int | None = None
    """Ids to draw from, the model's first ones; None: all."""

    def __post_init__(self):
        _require_sizes(self, "pairs")
        require_positive(self, "length", "rows")
        if self.length < 2 * max(self.pairs) + 1:
            raise ValueError(
                f"Recall.length={self.length} has no room for {max(self.pairs)} pairs and a "
                f"question; give at least {2 * max(self.pairs) + 1}, or fewer pairs."
            )
