"""Where every stored tensor goes in our tree, as rows to read."""

import dataclasses
from collections.abc import Hashable

from hybrid_jax.checkpoint.matching import Match, Stored
from hybrid_jax.checkpoint.names import folding
from hybrid_jax.checkpoint.names.rules import Rule


@dataclasses.dataclass(frozen=True)
class Row:
    """One stored tensor, or many that are alike."""

    name: str
    """Stored name, or the pattern of many."""
    count: int
    shape: tuple[int, ...] | None
    """As stored; None if neither a header nor the config says."""
    use: str
    """`weight`; else why it fills nothing: `scale`, `derived`, `vision`, `unknown`."""
    leaf: str | None = None
    """The parameter of our tree that it fills a block of."""
    index: str | None = None
    """The block, e.g. `[0..9, 0..6, 3, :, 0]`; dims past its end are whole."""
    split: tuple[int, ...] | None = None
    """The shape with fused dims taken apart."""
    order: tuple[int, ...] | None = None
    """The split dims in our order."""


def rows(match: Match, stored: Stored, *, full: bool = False) -> list[Row]:
    """A row for each kind of stored tensors by order of first appearance; `full`: for each."""
    uses = {name: "scale" for name in match.scales.values()}
    uses |= dict.fromkeys(match.derived, "derived") | dict.fromkeys(match.vision, "vision")
    uses |= dict.fromkeys(match.unknown, "unknown")

    def form(name: str) -> Hashable:
        rule, info = match.rules.get(name), stored[name]
        if rule is None:
            return uses[name], None if info is None else info.shape
        return rule.leaf, rule.shape, rule.split, rule.order

    if full:
        groups = [folding.Folded(name, (name,)) for name in stored]
    else:
        groups = folding.fold(stored, form)
    return [_row(group, match, stored, uses) for group in groups]


def _row(group: folding.Folded, match: Match, stored: Stored, uses) -> Row:
    first = group.names[0]
    rule, info = match.rules.get(first), stored[first]
    if rule is None:
        shape = None if info is None else info.shape
        return Row(group.pattern, len(group.names), shape, uses[first])
    return Row(
        group.pattern,
        len(group.names),
        rule.shape if info is None else info.shape,
        "weight",
        rule.leaf,
        _index([match.rules[name] for name in group.names]),
        rule.split,
        rule.order,
    )


def _index(rules: list[Rule]) -> str:
    """The blocks of all rules, whose indexes are of one length."""
    columns = zip(*(rule.index for rule in rules), strict=True)
    items = [":" if None in column else folding.spans(column) for column in columns]
    return f"[{', '.join(items)}]" if items else ""
