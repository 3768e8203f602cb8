"""What a report knows of a run, as plain values, and curves out of it."""

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One run."""

    name: str
    """As it is called in legends; different for each run of a report."""
    records: list[dict]
    """Those of metrics.jsonl, in the order of steps."""
    config: dict[str, str]
    """Path of each leaf of the configuration, and its value as text; {} if it is not known."""
    starts: list[dict]
    """Those of environment.json: {"step": int, "environment": {name: text}}; [] if not known."""
    layers: tuple[int, ...] = ()
    """Numbers of the lightning layers; () if they are not known."""
    sources: tuple[str, ...] = ()
    """Names of the sources of data; () if they are not known."""
    lengths: dict[str, dict] = dataclasses.field(default_factory=dict)
    """By source: `lengths` of its dataset.json, where that is known."""


Curve = tuple[list[int], list[float]]
"""Steps and values."""


def curve(run: Recorded, name: str) -> Curve:
    """The numbers of a metric; steps without one, or without a finite one, are left out."""
    pairs = [(r["step"], r[name]) for r in run.records if is_number(r.get(name))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curves(run: Recorded, name: str) -> list[Curve]:
    """A curve for each element of a metric that is a list."""
    lists = [(r["step"], r[name]) for r in run.records if isinstance(r.get(name), list)]
    longest = max((len(values) for _, values in lists), default=0)
    found: list[Curve] = []
    for idx in range(longest):
        pairs = [(s, v[idx]) for s, v in lists if idx < len(v) and is_number(v[idx])]
        found.append(([step for step, _ in pairs], [value for _, value in pairs]))
    return found


def names(runs: Iterable[Recorded], kind: type) -> list[str]:
    """Metrics that have a number (kind float) or a list in some record, in order of appearance."""
    found: dict[str, None] = {}
    for run in runs:
        for record in run.records:
            for name, value in record.items():
                if isinstance(value, list) if kind is list else is_number(value):
                    found[name] = None
    return list(found)


def is_number(value) -> bool:
    """Whether there is something to draw."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
