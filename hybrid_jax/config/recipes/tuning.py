"""Supervised fine-tuning as published."""

import dataclasses

from hybrid_jax.config import training as t
from hybrid_jax.config.data import Data, FirstFit, Source
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.config.recipes.budget import Amounts, Budget
from hybrid_jax.config.recipes.models import with_rope
from hybrid_jax.config.recipes.pretraining import with_steps


def sft_short(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """Stage I of MiniMax-01's post-training (report, table 8): rows of 8192 tokens, 128 of them,
    two epochs, 1e-5 to 1e-6 by a cosine."""
    schedule = t.Schedule(peak=1e-5, decay=t.Cosine(final_fraction=0.1))
    return _sft(model, sources, budget, 8192, 128, schedule)


def sft_long(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """Stage II of the same: rows of 1,032,192 tokens, 80 of them, two epochs, 3e-6 throughout."""
    schedule = t.Schedule(peak=3e-6, decay=t.Constant())
    return _sft(model, sources, budget, 1_032_192, 80, schedule)


def sft_reasoning(model: ModelConfig, sources: tuple[Source, ...], budget: Budget) -> t.TrainConfig:
    """M1's start before reinforcement learning: long chains of thought, about 60% mathematics and
    code (M1 report, section 2.2). It gives no numbers: rows of 32K tokens and stage I's rest are
    ours."""
    schedule = t.Schedule(peak=1e-5, decay=t.Cosine(final_fraction=0.1))
    return _sft(model, sources, budget, 32768, 128, schedule)


def _sft(model, sources, budget: Budget, length: int, rows: int, schedule) -> t.TrainConfig:
    # Epochs, not tokens, were published; without a budget of tokens they decide the steps.
    amounts = budget.scale(Amounts(length, rows * length, 0.0))
    config = t.TrainConfig(
        model=with_rope(model, 1e7, amounts.length),
        data=Data(
            # Two epochs (table 8).
            sources=tuple(dataclasses.replace(source, max_epochs=2.0) for source in sources),
            sequence_length=amounts.length,
            packing=FirstFit(),
        ),
        steps=0,
        batch_size=amounts.rows,
        accumulate=budget.accumulate,
        schedule=dataclasses.replace(schedule, warmup_steps=10),
        optimizer=t.AdamW(b1=0.9, b2=0.95, weight_decay=0.1),
    )
    return with_steps(config, amounts.tokens, warmup_steps=100) if amounts.tokens else config
