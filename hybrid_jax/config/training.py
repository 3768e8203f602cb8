"""One training run as a value: model, data, batch, schedule, optimiser, losses and bookkeeping."""

import dataclasses
import functools

from hybrid_jax.config import model as model_lib
from hybrid_jax.config.checks import check_at_least, check_fraction
from hybrid_jax.config.data import Data
from hybrid_jax.config.faults import Faults
from hybrid_jax.config.observation import Observation
from hybrid_jax.config.optimizer import AdamW, Muon, Optimizer
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.config.start import Start
from hybrid_jax.config.tuning import Frozen, Full, LoRA, Tuning

__all__ = ["AdamW", "Frozen", "Full", "LoRA", "Muon", "Start"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak rate to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to `final_fraction` of it."""

    final_fraction: float = 0.1
    """Last rate as a share of the peak."""

    def __post_init__(self):
        check_fraction(self, "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from the peak to `final_fraction` of it."""

    final_fraction: float = 0.0
    """Last rate as a share of the peak."""

    def __post_init__(self):
        check_fraction(self, "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialTail:
    """The peak, then an exponential fall at the end, as in the MiniMax-01 report (section 4.2)."""

    tail_fraction: float = 0.1
    """Share of all steps spent falling; the report: about 1T of 11.4T tokens."""
    final_fraction: float = 0.15
    """Last rate as a share of the peak; the report falls to 3e-5 from 2e-4."""

    def __post_init__(self):
        check_fraction(self, "tail_fraction")
        check_fraction(self, "final_fraction")
        check_at_least(self, 0, "final_fraction", strict=True)


PHASE_SHAPES = ("constant", "linear", "cosine", "exponential")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training, as long as its share of all tokens."""

    share: float
    """Its tokens, relative to the other phases'."""
    start: float
    """Its first rate as a share of the peak."""
    end: float | None = None
    """Its last rate as a share of the peak; None: as the first."""
    shape: str = "constant"
    """How the one becomes the other: constant, linear, cosine or exponential."""

    def __post_init__(self):
        check_at_least(self, 0, "share", "start", strict=True)
        if self.shape not in PHASE_SHAPES:
            raise ValueError(f"Phase.shape must be one of {PHASE_SHAPES}; got {self.shape!r}.")
        if (self.end is None) != (self.shape == "constant"):
            raise ValueError(
                f"Phase.end belongs to every shape but constant; got end={self.end!r} with "
                f"{self.shape}."
            )
        if self.end is not None:
            check_at_least(self, 0, "end", strict=self.shape == "exponential")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """Phases one after the other, by tokens rather than steps where the batch grows on the way."""

    phases: tuple[Phase, ...] = (Phase(share=1.0, start=1.0),)
    """In order; together they last as long as the run."""

    def __post_init__(self):
        if not self.phases:
            raise ValueError("Phases.phases must hold at least one phase; got none.")


Decay = Constant | Cosine | Linear | ExponentialTail | Phases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step: linear warm-up to `peak`, then `decay` over the remaining steps."""

    peak: float = 1e-3
    """Highest learning rate."""
    warmup_steps: int = 50
    """Steps of the linear warm-up; the first step already moves."""
    decay: Decay = Cosine()
    """What happens after the warm-up."""

    def __post_init__(self):
        check_at_least(self, 0, "peak", strict=True)
        check_at_least(self, 0, "warmup_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportBalance:
    """The balance loss of the MiniMax-01 report: coefficient * (1/E) * sum of f_i * m_i."""

    coefficient: float = 0.01
    """Its weight (section 4.2)."""

    def __post_init__(self):
        check_at_least(self, 0, "coefficient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceBalance:
    """The balance loss of transformers: coefficient * E * sum of f_e * P_e over all layers."""

    coefficient: float = 0.001
    """Its weight (`router_aux_loss_coef`)."""

    def __post_init__(self):
        check_at_least(self, 0, "coefficient")


Balance = ReportBalance | HuggingFaceBalance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Cross-entropy in nats a token and what is added to it."""

    balance: Balance | None = ReportBalance()
    """Pushes the router towards equal loads; None adds nothing."""
    z_loss: float = 0.0
    """Weight of the mean squared log-normaliser of the output softmax."""
    router_z_loss: float = 0.0
    """Weight of the mean squared log-normaliser of the routers, summed over layers."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at one time; bounds memory, changes no value."""

    def __post_init__(self):
        check_at_least(self, 0, "z_loss", "router_z_loss")
        check_at_least(self, 1, "chunk_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the whole state is stored; the last step always is."""

    every: int = 500
    """Steps from one checkpoint to the next."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self):
        check_at_least(self, 1, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When the held-out loss is measured; the last step always is."""

    every: int = 250
    """Steps from one evaluation to the next."""
    batches: int = 8
    """Batches of held-out windows to use, always the same ones; the last evaluation takes all."""

    def __post_init__(self):
        check_at_least(self, 1, "every", "batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """A batch size from some number of tokens on."""

    tokens: int
    """Tokens (places in rows, padding included) seen before it holds."""
    batch_size: int
    """Rows an update from then on; a multiple of the rows of one round."""

    def __post_init__(self):
        check_at_least(self, 1, "tokens", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes; stored as RUN/config.yaml."""

    model: model_lib.ModelConfig
    """The network."""
    data: Data
    """What it learns from."""
    steps: int
    """Optimiser updates in all; 0: as many as every source's `max_epochs` gives."""
    batch_size: int = 8
    """Windows an update, over all processes and accumulation rounds."""
    accumulate: int = 1
    """Rounds one batch is split into; less memory, the same update."""
    batch_ramp: tuple[Ramp, ...] = ()
    """Larger batches later on, of more rounds in proportion (MiniMax-01 report, section 4.2)."""
    schedule: Schedule = Schedule()
    """Learning rate by step."""
    optimizer: Optimizer = dataclasses.field(default_factory=AdamW)
    """How gradients become updates."""
    tuning: Tuning = dataclasses.field(default_factory=Full)
    """Which part of the model learns."""
    start: Start | None = None
    """What it begins with; None: random weights."""
    loss: Loss = Loss()
    """What is minimised."""
    checkpoints: Checkpoints = Checkpoints()
    """When the state is stored."""
    evaluation: Evaluation = Evaluation()
    """When the held-out loss is measured."""
    faults: Faults = dataclasses.field(default_factory=Faults)
    """What happens when something goes wrong."""
    observation: Observation = dataclasses.field(default_factory=Observation)
    """What is shown beside the metrics."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    parallel: Parallel | None = None
    """Mesh of devices and rules; None: all devices over fsdp, or the only one there is."""

    def __post_init__(self):
        check_at_least(self, 0, "steps")
        check_at_least(self, 1, "batch_size", "accumulate")
        # The keys of JAX hold 32 bits: a larger seed would be another one's run again.
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"TrainConfig.seed must be in [0, 2**32); got {self.seed!r}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}."
            )
        self._check_ramp()

    def _check_ramp(self) -> None:
        before = 0
        for idx, ramp in enumerate(self.batch_ramp):
            if ramp.tokens <= before:
                raise ValueError(
                    f"batch_ramp[{idx}].tokens={ramp.tokens} must be above {before}, where the "
                    "batch size before it begins."
                )
            if ramp.batch_size % self.rows_per_round:
                raise ValueError(
                    f"batch_ramp[{idx}].batch_size={ramp.batch_size} must be a multiple of the "
                    f"{self.rows_per_round} rows of a round (batch_size / accumulate)."
                )
            before = ramp.tokens

    @property
    def rows_per_round(self) -> int:
        """Rows that go through the model at a time, over all processes."""
        return self.batch_size // self.accumulate

    @functools.cached_property
    def phases(self) -> tuple[tuple[int, int, int], ...]:
        """(first step, tokens before it, batch size) of every batch size, in order."""
        phases = [(0, 0, self.batch_size)]
        for ramp in self.batch_ramp:
            step, tokens, size = phases[-1]
            per_step = size * self.data.sequence_length
            more = max(0, -(-(ramp.tokens - tokens) // per_step))
            phases.append((step + more, tokens + more * per_step, ramp.batch_size))
        return tuple(phases)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every batch size of the run, ascending."""
        return tuple(sorted({size for _, _, size in self.phases}))

    def batch_size_at(self, step: int) -> int:
        """Rows of the update that follows `step` others."""
        return next(size for first, _, size in reversed(self.phases) if step >= first)

    def tokens_before(self, step: int) -> int:
        """Places in rows that `step` updates see."""
        first, tokens, size = next(p for p in reversed(self.phases) if step >= p[0])
        return tokens + (step - first) * size * self.data.sequence_length
