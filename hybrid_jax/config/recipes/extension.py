"""Context extension: the three stages of MiniMax-Text-01 and the four of M1.

A stage is a run of its own that starts from the run before (`--start.path RUN`), with longer rows,
another rotary base and another mixture of short, medium and long documents.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from hybrid_jax.config import training as t
from hybrid_jax.config.data import Source, Weight
from hybrid_jax.config.faults import Faults, Spikes
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.config.recipes.budget import Amounts, Budget
from hybrid_jax.config.recipes.models import with_rope
from hybrid_jax.config.recipes.pretraining import sized

_K = 1 << 10
# Short is below 32K tokens, medium to 128K, long above (MiniMax-01 report, section 4.3).
_BORDERS = (32 * _K, 128 * _K)
_NAMES = ("short", "medium", "long")
# Over this share of a stage the weights go from those of the stage before to its own. The report
# interpolates linearly and does not say how long.
_TRANSITION = 0.1
# In the last fifth of each stage a tenth of the tokens are questions on long texts (same place).
_QUESTIONS = "long-qa"
_QUESTIONS_FROM, _QUESTIONS_WEIGHT = 0.8, 0.1


class Stage(NamedTuple):
    """What one stage changes."""

    length: int
    theta: float
    tokens: float
    shares: tuple[float, float, float]
    """Of short, medium and long documents."""
    before: tuple[float, float, float]
    """Those of the stage before."""


# MiniMax-01 report, table 6.
TEXT_01 = (
    Stage(128 * _K, 5e6, 300e9, (0.30, 0.70, 0.0), (0.30, 0.70, 0.0)),
    Stage(512 * _K, 1e7, 32e9, (0.35, 0.35, 0.30), (0.30, 0.70, 0.0)),
    Stage(1024 * _K, 1e7, 26e9, (0.30, 0.30, 0.40), (0.35, 0.35, 0.30)),
)
# M1 report, section 2.1: four stages from 32K to 1M, smoother than Text-01's, because longer ones
# at once made gradients explode. Sizes between, tokens and shares are not published: these are
# ours, Text-01's where it has them.
M1 = (
    Stage(32 * _K, 1e7, 32e9, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
    Stage(128 * _K, 1e7, 32e9, (0.30, 0.70, 0.0), (1.0, 0.0, 0.0)),
    Stage(512 * _K, 1e7, 32e9, (0.35, 0.35, 0.30), (0.30, 0.70, 0.0)),
    Stage(1024 * _K, 1e7, 26e9, (0.30, 0.30, 0.40), (0.35, 0.35, 0.30)),
)

Recipe = Callable[[ModelConfig, tuple[Source, ...], Budget], t.TrainConfig]


def stage(which: Stage, family: str, number: int) -> Recipe:
    """The recipe of a stage."""

    def recipe(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
        # A batch of 32M tokens: ours; a row of a million tokens leaves 32 rows.
        amounts = budget.scale(Amounts(which.length, 32 << 20, which.tokens))
        return sized(
            with_rope(model, which.theta, amounts.length),
            _buckets(sources, which, amounts.length_ratio),
            amounts,
            budget,
            warmup_steps=100,
            # The rate that pre-training ended with; the report gives none for the stages.
            schedule=t.Schedule(peak=3e-5, decay=t.Constant()),
            loss=t.Loss(balance=t.ReportBalance(coefficient=0.01)),
            # M1's gradients exploded where contexts grew fast (M1 report, section 2.1).
            faults=Faults(spikes=Spikes(rewind_after=5)),
        )

    recipe.__doc__ = (
        f"{family}, stage {number}: {which.length // _K}K tokens, rotary base {which.theta:g}, "
        f"{'/'.join(f'{share:.0%}' for share in which.shares)} short/medium/long documents."
    )
    return recipe


def _buckets(sources: tuple[Source, ...], which: Stage, length_ratio: float) -> tuple[Source, ...]:
    """Each source by document length; one called long-qa comes in at the end as it is."""
    # At any budget there are short documents, of two tokens at least.
    borders = [max(4 << idx, round(b * length_ratio)) for idx, b in enumerate(_BORDERS)]
    limits = ((1, borders[0] - 1), (borders[0], borders[1]), (borders[1] + 1, None))
    made = []
    for source in sources:
        if source.label == _QUESTIONS:
            made.append(dataclasses.replace(source, name=_QUESTIONS, schedule=_questions()))
            continue
        for idx, (fewest, most) in enumerate(limits):
            if not which.shares[idx] and not which.before[idx]:
                continue
            points = [(0.0, which.before[idx]), (_TRANSITION, which.shares[idx])]
            made.append(
                dataclasses.replace(
                    source,
                    name=f"{source.label}-{_NAMES[idx]}",
                    min_tokens=fewest,
                    max_tokens=most,
                    schedule=tuple(Weight(at=at, weight=source.weight * w) for at, w in points),
                )
            )
    return tuple(made)


def _questions() -> tuple[Weight, ...]:
    """A tenth of all from the last fifth on; the others' weights sum to 1 per unit of weight."""
    share = _QUESTIONS_WEIGHT / (1 - _QUESTIONS_WEIGHT)
    just_before = _QUESTIONS_FROM - 1e-6
    return (
        Weight(at=0.0, weight=0.0),
        Weight(at=just_before, weight=0.0),
        Weight(at=_QUESTIONS_FROM, weight=share),
    )
