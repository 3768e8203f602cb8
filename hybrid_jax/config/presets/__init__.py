"""Named models: `get("minimax-text-01")` is the whole configuration, with sources in each file."""

from hybrid_jax.config import model
from hybrid_jax.config.presets import minimax, own
from hybrid_jax.config.text import near_names

_PRESETS = {
    "minimax-text-01": minimax.minimax_text_01,
    "minimax-m1-40k": minimax.minimax_m1_40k,
    "minimax-m1-80k": minimax.minimax_m1_80k,
    "minimax-m2": minimax.minimax_m2,
    "minimax-m2.1": minimax.minimax_m2_1,
    "minimax-m2.5": minimax.minimax_m2_5,
    "minimax-m2.7": minimax.minimax_m2_7,
    "study-70m": own.study_70m,
    "study-410m": own.study_410m,
    "study-1b": own.study_1b,
    "quickstart": own.quickstart,
    "nano": own.nano,
}


def names() -> tuple[str, ...]:
    """Every preset's name."""
    return tuple(_PRESETS)


def get(name: str) -> model.ModelConfig:
    """The configuration called `name`; ValueError with near names if there is none."""
    if name not in _PRESETS:
        raise ValueError(
            f"There is no preset {name!r}.{near_names(name, names())} "
            f"Presets: {', '.join(names())}."
        )
    return _PRESETS[name]()
