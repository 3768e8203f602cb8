"""Which part of a model learns."""

import dataclasses

from hybrid_jax.config.checks import check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """All parameters learn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """Some parameters learn; the others keep every bit, and have neither gradients nor moments.

    Give `train` or `freeze`, globs over names such as `stack.runs.0.mixer.qkv`;
    `hybrid-jax presets NAME --parameters` lists them.
    """

    train: tuple[str, ...] = ()
    """What learns, e.g. '*.ffn.*'."""
    freeze: tuple[str, ...] = ()
    """What does not; all else learns."""

    def __post_init__(self):
        # With neither it is a half-made value, as a command line has it before its globs are read.
        if self.train and self.freeze:
            raise ValueError(
                "Frozen needs globs in train or in freeze, and not in both; got "
                f"train={self.train!r}, freeze={self.freeze!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Matrices of layers stay as they are; a product of two thin ones beside each learns.

    W + alpha / rank * A B, with B zero at the start (Hu et al., arXiv 2106.09685).
    """

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 32.0
    """The product counts alpha / rank times."""
    targets: tuple[str, ...] = ("*.mixer.*", "*.ffn.*")
    """Globs over the names of the matrices that get one. Routers, norms, embedding and head never
    do."""

    def __post_init__(self):
        check_at_least(self, 1, "rank")
        check_at_least(self, 0, "alpha", strict=True)
        if not self.targets:
            raise ValueError("LoRA.targets must hold at least one glob; got none.")

    @property
    def scale(self) -> float:
        """How often the product counts."""
        return self.alpha / self.rank


Tuning = Full | Frozen | LoRA
