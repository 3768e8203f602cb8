"""Names of the parameters that learn, from globs; the others are never touched."""

import fnmatch
from collections.abc import Iterable

from hybrid_jax.config import tuning as config_lib
from hybrid_jax.config.text import near_names
from hybrid_jax.model import lowrank
from sharding import Logical

Axes = dict[str, tuple[Logical, ...]]
"""What the dims of each parameter mean, by name."""


def trained(tuning: config_lib.Tuning, axes: Axes) -> frozenset[str]:
    """Those of the names in `axes` that learn; with LoRA these hold the thin matrices too.

    Raises ValueError for a glob that matches nothing, or if nothing is left to learn.
    """
    if isinstance(tuning, config_lib.Full):
        return frozenset(axes)
    if isinstance(tuning, config_lib.LoRA):
        return frozenset(name for name in axes if name.endswith((lowrank.A, lowrank.B)))
    if tuning.train:
        return matching(tuning.train, axes, "Frozen.train")
    if not tuning.freeze:
        raise ValueError("Frozen freezes nothing: give globs in tuning.train or tuning.freeze.")
    left = frozenset(axes) - matching(tuning.freeze, axes, "Frozen.freeze")
    if not left:
        raise ValueError(f"Frozen.freeze={tuning.freeze!r} leaves nothing to learn.")
    return left


def adapted(tuning: config_lib.Tuning, axes: Axes) -> tuple[str, ...]:
    """Weights that get a low-rank correction, in the order of `axes`."""
    if not isinstance(tuning, config_lib.LoRA):
        return ()
    able = [name for name, own in axes.items() if lowrank.is_adaptable(own)]
    chosen = matching(tuning.targets, able, "LoRA.targets")
    return tuple(name for name in able if name in chosen)


def matching(patterns: Iterable[str], names: Iterable[str], what: str) -> frozenset[str]:
    """Names that at least one glob matches. ValueError for a glob that matches none."""
    names, found = list(names), set[str]()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ValueError(
                f"{what}: {pattern!r} matches none of the names it may choose from."
                f"{near_names(pattern, names)} They are: {', '.join(names)}."
            )
        found.update(hits)
    return frozenset(found)
