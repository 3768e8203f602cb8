"""What is planned: a model's step, on a mesh of a target's devices."""

import dataclasses
import typing

Step = typing.Literal["train", "prefill", "decode", "rl"]
STEPS: tuple[str, ...] = typing.get_args(Step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One program to compile; complete, and JSON by `dataclasses.asdict`."""

    preset: str
    """Model, as `hybrid-jax presets` lists them."""
    target: str
    """Chip and topology: v5p:8x8x8, v6e:16x16, h200:8. A TPU topology counts chips."""
    step: str
    """train, prefill, decode, or rl: one update of a policy on sampled answers."""
    mesh: str
    """Sizes of the axes, counted in devices."""
    rules: str
    """Preset of `sharding.rules`."""
    batch: int
    """Rows of the whole batch."""
    seq: int
    """train: tokens a row; prefill and decode: the length of the context."""
    remat: str | None = None
    """train, rl: what the backward pass computes again; None is the preset's."""
    moments: str = "float32"
    """train, rl: how AdamW keeps its moments."""
    accumulate: int = 1
    """train, rl: rounds that a batch is split into."""
    capacity: float | None = None
    """Rows that the experts of a device take, as a multiple of an even share; None drops none."""
    token_groups: int = 1
    """Parts that a device's tokens travel to experts in."""
    chunk: int = 8192
    """prefill: tokens of a row that go through at a time."""

    def __post_init__(self):
        if self.step not in STEPS:
            raise ValueError(f"There is no step {self.step!r}; expected {', '.join(STEPS)}.")
        for name in ("batch", "seq", "accumulate", "chunk"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be a whole number >= 1; got {value!r}.")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity is a multiple of the even share; got {self.capacity!r}.")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be a multiple of accumulate={self.accumulate}."
            )
