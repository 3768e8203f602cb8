"""What a run shows beside its metrics file."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Changes nothing that a run computes; may be changed on --resume."""

    tensorboard: bool = False
    """Also write the metrics as TensorBoard event files into RUN/tensorboard (the extra
    `tensorboard`)."""
    state_norms: bool = True
    """At each evaluation, measure the memories of the lightning layers after the beginnings of some
    held-out documents."""
    profile_at: int | None = None
    """Step at which a trace of jax.profiler begins, in RUN/profile; None: none."""
    profile_steps: int = 3
    """Steps in the trace."""

    def __post_init__(self):
        for name in ("profile_at", "profile_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Observation.{name} must be >= 1; got {value!r}.")
