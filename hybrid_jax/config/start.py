"""What a run begins with."""

import dataclasses

from hybrid_jax.config.checks import check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The weights of another run or checkpoint, instead of random ones.

    Parameters must agree in name and shape. What has no parameters may differ: rotary base,
    longest context, precision, recomputation. Read once, at the first step of a run.
    """

    path: str
    """Directory of a run, or of a checkpoint (Hugging Face or Orbax)."""
    step: int | None = None
    """Step of the run; None: its newest good checkpoint."""
    moments: bool = False
    """Also the state of the optimiser; of runs that trained the same parameters the same way."""

    def __post_init__(self):
        if not self.path:
            raise ValueError("Start.path must name the directory of a run or checkpoint; got ''.")
        if self.step is not None:
            check_at_least(self, 0, "step")
