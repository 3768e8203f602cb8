"""How each preset is trained unless told otherwise: whole `TrainConfig`s, one function a recipe."""

import dataclasses

from hybrid_jax.config import data, presets
from hybrid_jax.config import training as t

Sources = tuple[data.Source, ...]


def _default(preset: str, sources: Sources) -> t.TrainConfig:
    return t.TrainConfig(model=presets.get(preset), data=data.Data(sources=sources), steps=1000)


def _quickstart(preset: str, sources: Sources) -> t.TrainConfig:
    """Made for a few minutes on two CPU cores: few tokens a step, so that there are many steps."""
    config = _default(preset, sources)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=256),
        steps=360,
        batch_size=4,
        schedule=t.Schedule(peak=3e-3, warmup_steps=20, decay=t.Linear(final_fraction=0.05)),
        # With the report's 0.01, and with 0.5, one layer sent every token to the same two experts
        # within 50 steps; with 1 the loads are within a factor of 2 by then.
        loss=t.Loss(balance=t.ReportBalance(coefficient=1.0)),
        checkpoints=t.Checkpoints(every=100, keep=2),
        evaluation=t.Evaluation(every=50, batches=8),
    )


_RECIPES = {"quickstart": _quickstart}


def get(preset: str, sources: Sources) -> t.TrainConfig:
    """The recipe for `preset` on these sources; ValueError if there is no such preset."""
    return _RECIPES.get(preset, _default)(preset, sources)
