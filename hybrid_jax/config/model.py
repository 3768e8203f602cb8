"""A whole model as a value: a repeating pattern of runs of equal layers, and sizes around it."""

import dataclasses
import functools
import itertools

from hybrid_jax.config import layers as layers_lib

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "save_dots", "save_mixer", "save_collectives")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Precision by border; state, router, softmax, norms, head and loss are always float32."""

    parameters: str = "float32"
    """Storage of the parameters: float32 or bfloat16 (the router stays float32)."""
    compute: str = "float32"
    """Activations and matrix products: float32 or bfloat16."""

    def __post_init__(self):
        for name in ("parameters", "compute"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"Dtypes.{name} must be one of {DTYPES}; got {getattr(self, name)!r}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normal:
    """Every matrix is drawn from a normal with the standard deviation `initializer_range`."""

    def gain(self, num_layers: int) -> None:
        """No gain of DeepNorm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepNorm:
    """Xavier's normal for the matrices of layers: variance 2 / (rows + columns) * gain**2.

    The gain is `beta` for feed-forwards, values and output projections, and 1 for queries, keys and
    gates (DeepNet, arXiv 2203.00555, figure 2; MiniMax-01 report, section 4.2). Embedding, head and
    routers are drawn as by `Normal`: the report does not tell.
    """

    beta: float | None = None
    """The gain; None: (8 * layers) ** -0.25, as the report has it."""

    def __post_init__(self):
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"DeepNorm.beta must be > 0; got {self.beta!r}.")

    def gain(self, num_layers: int) -> float:
        """`beta`, or what the report makes of the number of layers."""
        return (8 * num_layers) ** -0.25 if self.beta is None else self.beta


Initialization = Normal | DeepNorm


# Keeps a damaged file from filling the memory with layers.
MAX_LAYERS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """`count` equal layers in a row, compiled once and scanned over."""

    layer: layers_lib.Layer
    """What each of them is."""
    count: int
    """How many stand in a row."""

    def __post_init__(self):
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count <= 0:
            raise ValueError(f"Run.count must be a positive whole number; got {self.count!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and precision of one model; complete, hashable and checked."""

    name: str
    """The preset or model this came from; nothing branches on it."""
    vocab_size: int
    """Rows of the embedding table and columns of the head."""
    hidden_dim: int
    """Model width."""
    pattern: tuple[Run, ...]
    """Runs of equal layers, in order; Text-01: seven lightning layers, then one softmax layer."""
    repeats: int
    """How often the pattern repeats."""
    norm_eps: float
    """Epsilon of every norm but the one inside lightning attention."""
    tie_embeddings: bool = False
    """Use the embedding table as the output head."""
    shift_embeddings: bool = False
    """Half of the input channels come from the previous token; small retrieval studies need it."""
    initializer_range: float = 0.02
    """Standard deviation of the matrices that `initialization` does not decide on."""
    initialization: Initialization = Normal()
    """How the matrices of layers start."""
    max_positions: int
    """Longest context the model is published for."""
    dtypes: Dtypes = Dtypes()
    """Precision of parameters and of computation."""
    remat: str = "none"
    """What the backward pass recomputes of a layer: none; full (all, from its input); save_dots
    (all but products with weights, those of experts excepted); save_mixer (all but what its mixer
    gives: no attention runs twice); save_collectives (all but what devices exchange: no rows go
    to experts twice). What each costs stands in `hybrid_jax.model.remat`."""
    scan_layers: bool = True
    """Compile equal layers once, as a loop; else one by one: faster on a CPU, longer to compile."""

    def __post_init__(self):
        layers_lib.require_positive(self, "vocab_size", "hidden_dim", "repeats", "max_positions")
        layers_lib.require_at_least_zero(self, "norm_eps", "initializer_range")
        if not self.pattern:
            raise ValueError("ModelConfig.pattern must hold at least one run of layers; got none.")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(
                f"A ModelConfig may have {MAX_LAYERS} layers at most; got {self.num_layers}."
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"ModelConfig.remat must be one of {REMAT_POLICIES}; got {self.remat!r}."
            )

    @functools.cached_property
    def layers(self) -> tuple[layers_lib.Layer, ...]:
        """Every layer in order, as a flat tuple."""
        once = itertools.chain.from_iterable([run.layer] * run.count for run in self.pattern)
        return tuple(once) * self.repeats

    @property
    def num_layers(self) -> int:
        """Layers in all."""
        return self.repeats * sum(run.count for run in self.pattern)


def fold_layers(layers) -> tuple[tuple[Run, ...], int]:
    """A flat sequence of layers as (pattern of runs, repeats), with the shortest pattern.

    Text-01's 80 layers come back as ((7 x lightning, 1 x softmax), 10): two bodies to compile.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("A model needs at least one layer; got an empty sequence.")
    period = next(
        p
        for p in range(1, len(layers) + 1)
        if len(layers) % p == 0 and layers == layers[:p] * (len(layers) // p)
    )
    runs = tuple(
        Run(layer=layer, count=len(tuple(group)))
        for layer, group in itertools.groupby(layers[:period])
    )
    return runs, len(layers) // period
