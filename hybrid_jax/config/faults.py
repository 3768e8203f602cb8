"""What a run does when something goes wrong: bad updates, spikes of the loss, hangs."""

import dataclasses

from hybrid_jax.config.checks import check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spikes:
    """Skip an update whose loss or gradient norm lies far above those of the steps before it.

    As OLMo-core (`SkipStepOptimizer`) and MaxText (`skip_step_on_spikes`) do. Watching begins when
    half the window is known.
    """

    window: int = 128
    """Steps before it that a step is held against."""
    sigmas: float = 6.0
    """Standard deviations above their mean that are too far."""
    rewind_after: int | None = None
    """Skipped updates in a row after which the parameters go back to the newest checkpoint before
    them; the data and the step go on. None: never."""
    max_rewinds: int = 3
    """How often in a run; later spikes are skipped only."""

    def __post_init__(self):
        check_at_least(self, 4, "window")
        check_at_least(self, 0, "sigmas", strict=True)
        if self.rewind_after is not None:
            check_at_least(self, 1, "rewind_after")
        check_at_least(self, 0, "max_rewinds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """An update whose loss or gradient is not a number is always skipped; the rest is here.

    May be changed on --resume.
    """

    max_skips_in_a_row: int = 10
    """Skipped updates in a row after which the run ends."""
    spikes: Spikes | None = None
    """When an update is skipped that has numbers, but bad ones; None: never."""
    hang_seconds: float | None = 1800.0
    """Without a step for so long, the process prints where it hangs and ends with exit code 75, on
    which launchers start it again; None: never. Set it well above the time of a step."""
    slow_seconds: float = 7200.0
    """The same for what takes longer once: compiling, and waiting for the last checkpoint."""

    def __post_init__(self):
        check_at_least(self, 1, "max_skips_in_a_row")
        check_at_least(self, 0, "slow_seconds", strict=True)
        if self.hang_seconds is not None:
            check_at_least(self, 0, "hang_seconds", strict=True)
        after = None if self.spikes is None else self.spikes.rewind_after
        if after is not None and after > self.max_skips_in_a_row:
            raise ValueError(
                f"Spikes.rewind_after={after} is never reached: the run ends after "
                f"max_skips_in_a_row={self.max_skips_in_a_row}. Raise one or lower the other."
            )
