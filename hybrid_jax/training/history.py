"""What the last steps were like, from which the next one's limits and a rewind or an end follow.

Everything here follows from the records of metrics.jsonl, so a resumed run knows what an
uninterrupted one would.
"""

import collections
import math
from collections.abc import Iterable

import numpy as np

from hybrid_jax.config.faults import Faults
from hybrid_jax.training import guard


class History:
    """Fed with the record of every step, in order."""

    def __init__(self, faults: Faults):
        self._faults = faults
        window = 1 if faults.spikes is None else faults.spikes.window
        self._losses: collections.deque[float] = collections.deque(maxlen=window)
        self._norms: collections.deque[float] = collections.deque(maxlen=window)
        self.skipped_in_a_row = 0
        """Updates without effect up to now."""
        self.skipped = 0
        """The same of the whole run."""
        self.rewinds = 0
        """How often the parameters went back."""

    def add(self, record: dict) -> None:
        """The next step. Spikes count too: if the level has risen for good, limits follow."""
        loss, norm = record.get("loss"), record.get("gradient_norm")
        # Null in the metrics file where it was no number.
        if loss is not None and norm is not None and math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._norms.append(norm)
        was_skipped = bool(record.get("skipped"))
        self.skipped += was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        if "rewound_to" in record:
            self.rewound()

    def rewound(self) -> None:
        """The parameters went back after the step added last."""
        self.rewinds += 1
        self.skipped_in_a_row = 0

    def limits(self) -> guard.Limits:
        """Of the next step; the same bits in every process, whatever machine it runs on."""
        spikes = self._faults.spikes
        if spikes is None or len(self._losses) < spikes.window // 2:
            return guard.NO_LIMITS
        return guard.Limits(_limit(self._losses, spikes.sigmas), _limit(self._norms, spikes.sigmas))

    @property
    def wants_rewind(self) -> bool:
        """Whether so many updates in a row were skipped that the parameters should go back."""
        spikes = self._faults.spikes
        return (
            spikes is not None
            and spikes.rewind_after is not None
            and self.skipped_in_a_row >= spikes.rewind_after
            and self.rewinds < spikes.max_rewinds
        )

    @property
    def is_hopeless(self) -> bool:
        """Whether the run should end."""
        return self.skipped_in_a_row >= self._faults.max_skips_in_a_row

    def to_json(self) -> dict:
        """For another process; `load` is its inverse."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "counts": [self.skipped_in_a_row, self.skipped, self.rewinds],
        }

    def load(self, state: dict) -> None:
        """Become what `to_json` was taken of."""
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self.skipped_in_a_row, self.skipped, self.rewinds = state["counts"]


def _limit(values: Iterable[float], sigmas: float) -> np.float32:
    """Mean and so many standard deviations. Sums are exact: no order, no machine changes them."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return np.float32(mean + sigmas * math.sqrt(variance))
