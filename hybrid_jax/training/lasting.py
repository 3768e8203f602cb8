"""How many steps the data lasts for."""

import dataclasses
from collections.abc import Sequence

from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import WindowIndex


def with_steps(config: TrainConfig, windows: Sequence[WindowIndex]) -> TrainConfig:
    """`config`, with as many steps as its sources give if `steps` is 0.

    Raises ValueError if they give fewer than it asks for, or none, or if there is no end to them.
    """
    limits = [source.max_epochs for source in config.data.sources]
    endless = [source.label for source in config.data.sources if source.max_epochs is None]
    if endless:
        if not config.steps:
            raise ValueError(
                f"steps=0 means as many as the sources give in `max_epochs`, but {endless[0]} has "
                "none. Give --steps N, or --data.sources.0.max-epochs."
            )
        return config
    rows = sum(int(most * len(each)) for most, each in zip(limits, windows, strict=True) if most)
    given = _steps(config, rows)
    if not given:
        raise ValueError(
            f"The sources give {rows} rows in `max_epochs`, less than a batch of "
            f"{config.batch_size}. Give more data, a smaller --batch-size, or more --data.sources.0"
            ".max-epochs."
        )
    if config.steps > given:
        raise ValueError(
            f"The sources give {rows} rows in `max_epochs`, which is {given} steps; "
            f"steps={config.steps}. Give --steps {given} or fewer (0 takes all there are), or more "
            "--data.sources.0.max-epochs."
        )
    return config if config.steps else dataclasses.replace(config, steps=given)


def _steps(config: TrainConfig, rows: int) -> int:
    """Full batches out of so many rows, while batches grow."""
    steps = 0
    ends = [first for first, _, _ in config.phases[1:]]
    for (first, _, size), end in zip(config.phases, [*ends, None], strict=True):
        most = rows // size if end is None else min(rows // size, end - first)
        steps, rows = first + most, rows - most * size
        if end is not None and steps < end:
            break
    return steps
