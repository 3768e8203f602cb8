"""Pre-training as published: MiniMax-01, the continuation that became M1, and the scaling study."""

import dataclasses

from hybrid_jax.config import training as t
from hybrid_jax.config.data import Data, Source
from hybrid_jax.config.model import DeepNorm, ModelConfig
from hybrid_jax.config.recipes.budget import Amounts, Budget
from hybrid_jax.config.recipes.models import with_rope

_LENGTH = 8192
_TOKENS = 11.4e12
_FIRST_BATCH = 16 << 20
# Tokens seen before the batch doubles.
_DOUBLINGS = (69e9, 790e9, 4.7e12)


def minimax_01(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """MiniMax-Text-01 from scratch (MiniMax-01 report, section 4.2).

    AdamW 0.9/0.95, decay 0.1; sequence 8192; batch 16M tokens, doubled at 69B, 790B and 4.7T;
    500 steps of warm-up to 2e-4, constant for 7.2T tokens, 1.3e-4 for 3.2T, exponential to 3e-5 in
    the last 1T; balance loss 0.01; rotary base 10,000; Xavier with DeepNorm's gains.
    """
    amounts = budget.scale(Amounts(_LENGTH, _FIRST_BATCH, _TOKENS))
    ramp = tuple(
        t.Ramp(
            tokens=max(1, round(seen / _TOKENS * amounts.tokens)),
            batch_size=amounts.rows << doublings,
        )
        for doublings, seen in enumerate(_DOUBLINGS, start=1)
    )
    return sized(
        dataclasses.replace(with_rope(model, 1e4, amounts.length), initialization=DeepNorm()),
        sources,
        amounts,
        budget,
        warmup_steps=500,
        batch_ramp=ramp,
        schedule=t.Schedule(
            peak=2e-4,
            decay=t.Phases(
                phases=(
                    t.Phase(share=7.2, start=1.0),
                    t.Phase(share=3.2, start=1.3 / 2),
                    t.Phase(share=1.0, start=1.3 / 2, end=0.3 / 2, shape="exponential"),
                )
            ),
        ),
        optimizer=t.AdamW(b1=0.9, b2=0.95, weight_decay=0.1),
        loss=t.Loss(balance=t.ReportBalance(coefficient=0.01)),
    )


def m1_continued(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """Text-01 continued on more reasoning, STEM and code, before M1 (M1 report, section 2.1).

    8e-5 for 2.5T tokens, then down to 8e-6 over 5T. The report lowers the balance loss and says not
    by how much: 0.001 is ours, as are the length, the batch (the last of pre-training) and the
    exponential shape of the fall.
    """
    amounts = budget.scale(Amounts(_LENGTH, 128 << 20, 7.5e12))
    return sized(
        with_rope(model, 1e7, amounts.length),
        sources,
        amounts,
        budget,
        warmup_steps=0,
        schedule=t.Schedule(
            peak=8e-5,
            decay=t.Phases(
                phases=(
                    t.Phase(share=2.5, start=1.0),
                    t.Phase(share=5.0, start=1.0, end=0.1, shape="exponential"),
                )
            ),
        ),
        loss=t.Loss(balance=t.ReportBalance(coefficient=0.001)),
    )


def scaling_study(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """One run of the scaling study (MiniMax-01 report, section 2.2): up to 300B tokens, sequence
    8192, batches of 4M tokens, Adam at a constant 3e-4 with decay 0.1.

    For presets such as study-410m, study-410m-softmax and study-410m-lightning.
    """
    amounts = budget.scale(Amounts(_LENGTH, 4 << 20, 300e9))
    return sized(
        with_rope(model, 1e4, amounts.length),
        sources,
        amounts,
        budget,
        warmup_steps=500,
        schedule=t.Schedule(peak=3e-4, decay=t.Constant()),
        optimizer=t.AdamW(b1=0.9, b2=0.95, weight_decay=0.1),
    )


def sized(
    model: ModelConfig,
    sources: tuple[Source, ...],
    amounts: Amounts,
    budget: Budget,
    *,
    warmup_steps: int,
    **changes,
) -> t.TrainConfig:
    """A run of these amounts; `changes` are fields of TrainConfig."""
    config = t.TrainConfig(
        model=model,
        data=Data(sources=sources, sequence_length=amounts.length),
        steps=0,
        batch_size=amounts.rows,
        accumulate=budget.accumulate,
        **changes,
    )
    return with_steps(config, amounts.tokens, warmup_steps)


def with_steps(config: t.TrainConfig, tokens: float, warmup_steps: int) -> t.TrainConfig:
    """`config` for so many tokens: steps, warm-up, checkpoints and evaluations to match.

    The warm-up is at most a tenth of the run.
    """
    first, before, size = next(p for p in reversed(config.phases) if p[1] <= tokens)
    more = (tokens - before) / (size * config.data.sequence_length)
    steps = max(1, first + round(more))
    schedule = dataclasses.replace(
        config.schedule, warmup_steps=min(warmup_steps, max(1, steps // 10))
    )
    every = max(1, min(500, steps // 10))
    return dataclasses.replace(
        config,
        steps=steps,
        schedule=schedule,
        checkpoints=dataclasses.replace(config.checkpoints, every=every),
        evaluation=dataclasses.replace(config.evaluation, every=every),
    )
