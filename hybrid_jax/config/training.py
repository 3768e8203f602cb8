"""One training run as a value: model, data, batch, schedule, optimiser, losses and bookkeeping."""

import dataclasses

from hybrid_jax.config import model as model_lib
from hybrid_jax.config.faults import Faults
from hybrid_jax.config.observation import Observation
from hybrid_jax.config.parallel import Parallel


def _check(config, minimum, *names: str, strict: bool = False) -> None:
    """Raise unless every named number of `config` is >= minimum (> minimum if strict)."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value > minimum if strict else value >= minimum):
            raise ValueError(
                f"{type(config).__name__}.{name} must be {'>' if strict else '>='} {minimum}; "
                f"got {value!r}."
            )


def _check_fraction(config, name: str) -> None:
    value = getattr(config, name)
    if not 0 <= value < 1:
        raise ValueError(f"{type(config).__name__}.{name} must be in [0, 1); got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Text files, one document each, tokenised once and cut into windows of equal length."""

    path: str
    """A directory (searched recursively), one file, or a glob such as 'books/**/*.txt'."""
    pattern: str = "*"
    """Names of the files to take from a directory, e.g. '*.py'."""
    exclude: tuple[str, ...] = ()
    """Paths below the directory to leave out, as globs, e.g. 'test/*'; hidden files always are."""
    tokenizer: str | None = None
    """A tokenizer.json to use; None trains one with `model.vocab_size` entries on the text."""
    sequence_length: int = 1024
    """Tokens a window; a longer document is split, shorter ones share a window as segments."""
    heldout_fraction: float = 0.05
    """Share of the files kept for evaluation, chosen by a hash of their path."""

    def __post_init__(self):
        if not self.path:
            raise ValueError("Text.path must name a directory, a file or a glob; got ''.")
        _check(self, 1, "sequence_length")
        _check_fraction(self, "heldout_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak rate to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to `final_fraction` of it."""

    final_fraction: float = 0.1
    """Last rate as a share of the peak."""

    def __post_init__(self):
        _check_fraction(self, "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from the peak to `final_fraction` of it."""

    final_fraction: float = 0.0
    """Last rate as a share of the peak."""

    def __post_init__(self):
        _check_fraction(self, "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialTail:
    """The peak, then an exponential fall at the end, as in the MiniMax-01 report (section 4.2)."""

    tail_fraction: float = 0.1
    """Share of all steps spent falling; the report: about 1T of 11.4T tokens."""
    final_fraction: float = 0.15
    """Last rate as a share of the peak; the report falls to 3e-5 from 2e-4."""

    def __post_init__(self):
        _check_fraction(self, "tail_fraction")
        _check_fraction(self, "final_fraction")
        _check(self, 0, "final_fraction", strict=True)


Decay = Constant | Cosine | Linear | ExponentialTail


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
        _check(self, 0, "peak", strict=True)
        _check(self, 0, "warmup_steps")


MOMENTS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with clipping of the global gradient norm; arithmetic is float32."""

    b1: float = 0.9
    """Decay of the first moment (MiniMax-01 report, section 4.2)."""
    b2: float = 0.95
    """Decay of the second moment (same place)."""
    eps: float = 1e-8
    """Added to the root of the second moment; RL of M1 needed 1e-15."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and vectors are never decayed."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None clips nothing."""
    moments: str = "float32"
    """How both moments are kept: float32, or bfloat16 at 4 bytes a parameter less (as DeepSeek-V3
    was trained, arXiv 2412.19437, section 3.3.3)."""

    def __post_init__(self):
        if self.moments not in MOMENTS:
            raise ValueError(f"AdamW.moments must be one of {MOMENTS}; got {self.moments!r}.")
        _check_fraction(self, "b1")
        _check_fraction(self, "b2")
        _check(self, 0, "eps", "weight_decay")
        if self.clip_norm is not None:
            _check(self, 0, "clip_norm", strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportBalance:
    """The balance loss of the MiniMax-01 report: coefficient * (1/E) * sum of f_i * m_i."""

    coefficient: float = 0.01
    """Its weight (section 4.2)."""

    def __post_init__(self):
        _check(self, 0, "coefficient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceBalance:
    """The balance loss of transformers: coefficient * E * sum of f_e * P_e over all layers."""

    coefficient: float = 0.001
    """Its weight (`router_aux_loss_coef`)."""

    def __post_init__(self):
        _check(self, 0, "coefficient")


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
        _check(self, 0, "z_loss", "router_z_loss")
        _check(self, 1, "chunk_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the whole state is stored; the last step always is."""

    every: int = 500
    """Steps from one checkpoint to the next."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self):
        _check(self, 1, "every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When the held-out loss is measured; the last step always is."""

    every: int = 250
    """Steps from one evaluation to the next."""
    batches: int = 8
    """Batches of held-out windows to use, always the same ones; the last evaluation takes all."""

    def __post_init__(self):
        _check(self, 1, "every", "batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes; stored as RUN/config.yaml."""

    model: model_lib.ModelConfig
    """The network."""
    data: Text
    """What it learns from."""
    steps: int
    """Optimiser updates in all."""
    batch_size: int = 8
    """Windows an update, over all processes and accumulation rounds."""
    accumulate: int = 1
    """Rounds one batch is split into; less memory, the same update."""
    schedule: Schedule = Schedule()
    """Learning rate by step."""
    optimizer: AdamW = AdamW()
    """How gradients become updates."""
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
        _check(self, 1, "steps", "batch_size", "accumulate")
        # The keys of JAX hold 32 bits: a larger seed would be another one's run again.
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"TrainConfig.seed must be in [0, 2**32); got {self.seed!r}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}."
            )
