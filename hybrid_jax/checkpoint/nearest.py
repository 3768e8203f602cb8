"""Which preset a checkpoint is, or is nearest to."""

import dataclasses
from collections.abc import Collection

from hybrid_jax.checkpoint.names import minimax
from hybrid_jax.config import model, presets, text


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Presets of one and the same network."""

    names: tuple[str, ...]
    differences: tuple[str, ...]
    """`field: here, not there` where the checkpoint is another network; empty if it is the same."""


def of_config(config: model.ModelConfig) -> Nearest:
    """The presets that are the same network, or share most fields with it."""
    here = _fields(config)
    shares = {}
    for name in presets.names():
        there = _fields(presets.get(name))
        same = sum(here[field] == there.get(field, ...) for field in here)
        shares[name] = same / len(here.keys() | there.keys())
    best = max(shares.values())
    names = tuple(name for name, share in shares.items() if share == best)
    return Nearest(names, differences(config, presets.get(names[0])))


def of_names(stored: Collection[str]) -> Nearest:
    """The presets whose published names are most of those that are stored."""
    stored = set(stored)
    shares = {}
    for name in presets.names():
        try:
            wanted = {rule.name for rule in minimax.rules(presets.get(name), stored)}
        except ValueError:
            # No release has such a model, and no published name.
            continue
        shares[name] = len(wanted & stored) / len(wanted | stored)
    best = max(shares.values())
    names = tuple(name for name, share in shares.items() if share == best)
    return Nearest(names, ("there is no readable config: by names alone",))


def differences(here: model.ModelConfig, there: model.ModelConfig) -> tuple[str, ...]:
    """`field: here, not there` for every field in which two models are different networks."""
    ours, theirs = _fields(here), _fields(there)
    return tuple(
        f"{field}: {ours.get(field, 'absent')}, not {theirs.get(field, 'absent')}"
        for field in {**ours, **theirs}
        if ours.get(field, ...) != theirs.get(field, ...)
    )


def _fields(config: model.ModelConfig) -> dict[str, str]:
    """What makes the network; how it starts, is computed and is called does not."""
    plain = dataclasses.replace(
        config,
        name="",
        dtypes=model.Dtypes(),
        remat="none",
        scan_layers=True,
        initializer_range=0.0,
        initialization=model.Normal(),
    )
    lines = (line.split(" = ", 1) for line in text.dump(plain).splitlines())
    return dict(lines)
