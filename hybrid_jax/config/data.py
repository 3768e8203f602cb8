"""What a run learns from: sources, how they are mixed, and how documents become rows."""

import dataclasses
import pathlib
from collections.abc import Sequence

from hybrid_jax.config.checks import check_at_least, check_fraction

FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord", "arrow")
TEMPLATES = ("minimax-text-01", "minimax-m1", "minimax-m2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A source's weight at one point of the run; between two points it lies on a straight line."""

    at: float
    """Share of the run that is done, from 0 to 1."""
    weight: float
    """Its weight there."""

    def __post_init__(self):
        check_at_least(self, 0, "at", "weight")
        if self.at > 1:
            raise ValueError(f"Weight.at must be in [0, 1]; got {self.at!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of one kind: files to be tokenised, or what `hybrid-jax data prepare` made."""

    path: str
    """A directory (searched recursively), one file, a glob such as 'books/**/*.txt', a Hugging
    Face data set on disk, or a directory that `hybrid-jax data prepare` made."""
    name: str = ""
    """What metrics call it; '' takes the last part of the path."""
    format: str = "auto"
    """auto decides file by file, by its ending: .jsonl and .jsonl.gz, .parquet, .array_record and
    .arrow hold records, everything else is one document of text. The others force one."""
    pattern: str = "*"
    """Names of the files to take from a directory, e.g. '*.py'."""
    exclude: tuple[str, ...] = ()
    """Paths below the directory to leave out, as globs, e.g. 'test/*'; hidden files always are."""
    field: str = "text"
    """The field of a record that holds its text."""
    template: str | None = None
    """How conversations become text: minimax-text-01, minimax-m1 or minimax-m2. Records then hold
    `messages`, or `prompt` and `response`, and only what the assistant says is learned."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources' weights."""
    schedule: tuple[Weight, ...] = ()
    """Weights on the way, instead of the one `weight`; before the first point and after the last
    it stays as it is there."""
    min_tokens: int = 1
    """Shortest document to take, in tokens."""
    max_tokens: int | None = None
    """Longest document to take, in tokens; None takes all. With `min_tokens` it makes length
    buckets of one data set, each with a weight."""
    max_epochs: float | None = None
    """How often its rows are seen at most; after that the others share its weight. None: no
    limit."""

    def __post_init__(self):
        if not self.path:
            raise ValueError("Source.path must name a directory, a file or a glob; got ''.")
        for name, known in (("format", FORMATS), ("template", (None, *TEMPLATES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Source.{name} must be one of {known}; got {getattr(self, name)!r}."
                )
        check_at_least(self, 0, "weight")
        check_at_least(self, 1, "min_tokens")
        if self.max_tokens is not None:
            check_at_least(self, self.min_tokens, "max_tokens")
        if self.max_epochs is not None:
            check_at_least(self, 0, "max_epochs", strict=True)
        places = [point.at for point in self.schedule]
        if places != sorted(places):
            raise ValueError(f"Source.schedule must have ascending `at`; got {places}.")

    @property
    def label(self) -> str:
        """Its name, or what its path says."""
        return self.name or pathlib.PurePath(self.path).name or self.path

    def weight_at(self, progress: float) -> float:
        """Its weight when `progress` of the run, from 0 to 1, is done."""
        if not self.schedule:
            return self.weight
        before = [point for point in self.schedule if point.at <= progress]
        after = [point for point in self.schedule if point.at > progress]
        if not before:
            return after[0].weight
        if not after:
            return before[-1].weight
        start, end = before[-1], after[0]
        share = (progress - start.at) / (end.at - start.at)
        return start.weight + share * (end.weight - start.weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concatenate:
    """Documents end to end; one that a row's end cuts goes on in another row, as a segment of its
    own. No padding but in the last row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstFit:
    """Documents whole, the longest first, each in the first row with room for it (first-fit
    decreasing); one longer than a row is cut into rows before. The rest of a row is padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aligned:
    """As Concatenate, with every document padded to a multiple of `multiple` tokens, as the
    MiniMax-01 report does for its sequence-parallel lightning attention (section 3.2.2)."""

    multiple: int = 256
    """The block of lightning attention."""

    def __post_init__(self):
        check_at_least(self, 1, "multiple")


Packing = Concatenate | FirstFit | Aligned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Sources, tokenised once, mixed by weight and packed into rows of equal length."""

    sources: tuple[Source, ...]
    """One or more; every row comes from one of them."""
    tokenizer: str | None = None
    """A tokenizer.json to use; None takes that of the prepared sources, or trains one with
    `model.vocab_size` entries on the text."""
    sequence_length: int = 1024
    """Tokens a row."""
    packing: Packing = Concatenate()
    """How documents share rows, as segments that never see one another."""
    heldout_fraction: float = 0.05
    """Share of the documents kept for evaluation, chosen by a hash of their name. Of prepared
    sources the share is their own."""
    deduplicate: bool = False
    """Leave out documents whose text was there before in the same source; prepared ones as they
    were made."""

    def __post_init__(self):
        if not self.sources:
            raise ValueError("Data.sources must hold at least one source; got none.")
        labels = [source.label for source in self.sources]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(
                f"Data.sources hold {', '.join(sorted(twice))} more than once; give each its own "
                "`name`."
            )
        check_at_least(self, 1, "sequence_length")
        check_fraction(self, "heldout_fraction")
        if isinstance(self.packing, Aligned) and self.sequence_length % self.packing.multiple:
            raise ValueError(
                f"Data.sequence_length={self.sequence_length} must be a multiple of "
                f"packing.multiple={self.packing.multiple}."
            )


def text(path: str, **changes) -> Data:
    """One source at `path`; `changes` are fields of Data."""
    return Data(sources=(Source(path=path),), **changes)


def parse_sources(words: Sequence[str]) -> tuple[Source, ...]:
    """Sources from PATH or PATH=WEIGHT each; a path that exists is one, whatever is in it."""
    sources = []
    for word in words:
        path, equals, weight = word.rpartition("=")
        if not equals or pathlib.Path(word).exists():
            sources.append(Source(path=word))
            continue
        try:
            sources.append(Source(path=path, weight=float(weight)))
        except ValueError as error:
            raise ValueError(
                f"{word!r} must be PATH or PATH=WEIGHT with a number >= 0 as weight, such as "
                "web=0.7."
            ) from error
    return tuple(sources)
