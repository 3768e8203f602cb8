"""How a model is trained: whole `TrainConfig`s, as published or our own, by name."""

import dataclasses

from hybrid_jax.config import presets
from hybrid_jax.config import training as t
from hybrid_jax.config.data import Data, Source
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.config.recipes import extension, pretraining, tuning
from hybrid_jax.config.recipes.budget import Budget
from hybrid_jax.config.recipes.extension import Recipe
from hybrid_jax.config.text import near_names

PUBLISHED = Budget()
"""As it was published."""

__all__ = ["PUBLISHED", "Budget", "about", "get", "names", "of_preset"]


def default(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """A thousand small steps, for a first look."""
    length = budget.length or 1024
    rows = max(1, round((budget.batch_tokens or 8 * length) / length))
    steps = 1000 if budget.tokens is None else max(1, round(budget.tokens / (rows * length)))
    return t.TrainConfig(
        model=model,
        data=Data(sources=sources, sequence_length=length),
        steps=steps,
        batch_size=rows,
        accumulate=budget.accumulate,
    )


def quickstart(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """A few minutes on two CPU cores: few tokens a step, so that there are many steps."""
    config = default(model, sources, dataclasses.replace(budget, length=budget.length or 256))
    return dataclasses.replace(
        config,
        steps=360 if budget.tokens is None else config.steps,
        batch_size=4 if budget.batch_tokens is None else config.batch_size,
        schedule=t.Schedule(peak=3e-3, warmup_steps=20, decay=t.Linear(final_fraction=0.05)),
        # With the report's 0.01, and with 0.5, one layer sent every token to the same two experts
        # within 50 steps; with 1 the loads are within a factor of 2 by then.
        loss=t.Loss(balance=t.ReportBalance(coefficient=1.0)),
        checkpoints=t.Checkpoints(every=100, keep=2),
        evaluation=t.Evaluation(every=50, batches=8),
    )


_RECIPES: dict[str, Recipe] = {
    "default": default,
    "quickstart": quickstart,
    "minimax-01": pretraining.minimax_01,
    "text-01-128k": extension.stage(extension.TEXT_01[0], "MiniMax-Text-01", 1),
    "text-01-512k": extension.stage(extension.TEXT_01[1], "MiniMax-Text-01", 2),
    "text-01-1m": extension.stage(extension.TEXT_01[2], "MiniMax-Text-01", 3),
    "m1-continued": pretraining.m1_continued,
    "m1-32k": extension.stage(extension.M1[0], "MiniMax-M1", 1),
    "m1-128k": extension.stage(extension.M1[1], "MiniMax-M1", 2),
    "m1-512k": extension.stage(extension.M1[2], "MiniMax-M1", 3),
    "m1-1m": extension.stage(extension.M1[3], "MiniMax-M1", 4),
    "sft-8k": tuning.sft_short,
    "sft-1m": tuning.sft_long,
    "sft-reasoning": tuning.sft_reasoning,
    "scaling-study": pretraining.scaling_study,
}
# What a preset is trained by unless told otherwise.
_OF_PRESET = {"quickstart": "quickstart"}


def names() -> tuple[str, ...]:
    """Every recipe's name."""
    return tuple(_RECIPES)


def about(name: str) -> str:
    """What a recipe is, in a sentence or more."""
    return " ".join((_RECIPES[name].__doc__ or "").split())


def get(
    name: str, model: ModelConfig, sources: tuple[Source, ...], budget: Budget = PUBLISHED
) -> t.TrainConfig:
    """The recipe called `name` for a model on these sources; ValueError if there is none."""
    if name not in _RECIPES:
        raise ValueError(
            f"There is no recipe {name!r}.{near_names(name, names())} "
            f"Recipes: {', '.join(names())}."
        )
    return _RECIPES[name](model, sources, budget)


def of_preset(
    preset: str, sources: tuple[Source, ...], budget: Budget = PUBLISHED
) -> t.TrainConfig:
    """What a preset is trained by unless told otherwise; ValueError if there is no such preset."""
    return get(_OF_PRESET.get(preset, "default"), presets.get(preset), sources, budget)
