"""How far one array is from another: the four numbers a comparison reports.

The second argument is always the reference. `max_rel = max|a - b| / max|b|`: relative to the
largest value of the whole tensor, so that entries that happen to be near zero do not count alone.
`mean_rel = mean|a - b| / mean|b|`. `cosine` is that of the two flattened tensors. `top1` is the
share of positions whose largest entry is the same.
"""

import dataclasses
import math

import numpy as np

# JSON has no infinity: this is how far a tensor is that is not finite, or not zero where the
# reference is.
FARTHEST = 1.7976931348623157e308

# A gradient this far below the largest of the model is rounding: a router that always takes all
# its weight to one expert, say, has a gradient of exactly zero that float32 does not reach.
GRADIENT_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor against the reference; see the head of this file for the definitions."""

    max_rel: float
    mean_rel: float
    cosine: float


def difference(ours: np.ndarray, reference: np.ndarray, floor: float = 0.0) -> Difference:
    """`ours` against `reference`, computed in float64.

    `floor` is the least size `max|b|` and `mean|b|` are taken to have: an error far below anything
    else in the model is no error of the tensor, whose true value may be zero.
    """
    if ours.shape != reference.shape:
        raise ValueError(
            f"cannot compare shape {ours.shape} with the reference's {reference.shape}."
        )
    a, b = ours.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Difference(FARTHEST, FARTHEST, 0.0)
    gap = np.abs(a - b)
    if not gap.any():
        return Difference(0.0, 0.0, 1.0)
    size = np.abs(b)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return Difference(
        _ratio(float(gap.max()), max(float(size.max()), floor)),
        _ratio(float(gap.mean()), max(float(size.mean()), floor)),
        float(np.dot(a, b)) / norms if norms else 0.0,
    )


def top1(ours_BTW: np.ndarray, reference_BTW: np.ndarray) -> float:
    """Share of positions at which both prefer the same token."""
    return float((ours_BTW.argmax(-1) == reference_BTW.argmax(-1)).mean())


def gradient_differences(
    ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> list[tuple[str, Difference]]:
    """By tensor, the farthest first; the two must name the same tensors.

    The expert choice has no derivative: a correction bias may be absent from the reference and
    must then be zero in ours.
    """
    for name in ours.keys() - reference.keys():
        if name.endswith("e_score_correction_bias"):
            reference = reference | {name: np.zeros_like(ours[name])}
    if ours.keys() != reference.keys():
        raise ValueError(
            "the two sides name different weights: only ours "
            f"{sorted(ours.keys() - reference.keys())[:5]}, only the reference "
            f"{sorted(reference.keys() - ours.keys())[:5]}."
        )
    floor = GRADIENT_FLOOR * max(float(np.abs(value).max()) for value in reference.values())
    found = [(name, difference(ours[name], reference[name], floor)) for name in ours]
    return sorted(found, key=lambda pair: -pair[1].max_rel)


def _ratio(gap: float, size: float) -> float:
    value = gap / size if size else math.inf
    return min(value, FARTHEST)
