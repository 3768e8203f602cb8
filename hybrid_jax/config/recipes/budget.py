"""How much of a published recipe a user can afford; everything else follows in proportion."""

import dataclasses

from hybrid_jax.config.checks import check_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What replaces the published numbers; None keeps one."""

    length: int | None = None
    """Tokens a row; the borders between short and long documents move with it."""
    batch_tokens: int | None = None
    """Tokens of the first batch; a batch that grows does so in the same steps."""
    tokens: float | None = None
    """Tokens in all; phases keep their shares."""
    accumulate: int = 1
    """Rounds the first batch is split into."""

    def __post_init__(self):
        check_at_least(self, 1, "accumulate")
        for name in ("length", "batch_tokens", "tokens"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)

    def scale(self, published: "Amounts") -> "Amounts":
        """`published`, at this budget."""
        length = self.length or published.length
        batch_tokens = self.batch_tokens or published.batch_tokens
        return Amounts(
            length, batch_tokens, self.tokens or published.tokens, length / published.length
        )


@dataclasses.dataclass(frozen=True)
class Amounts:
    """The sizes of a run."""

    length: int
    batch_tokens: int
    tokens: float
    length_ratio: float = 1.0
    """This length over the published one."""

    @property
    def rows(self) -> int:
        """Rows of the first batch."""
        return max(1, round(self.batch_tokens / self.length))
