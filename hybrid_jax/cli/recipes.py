"""`hybrid-jax recipes`: every recipe of training and what it is, or one in full."""

import dataclasses
import textwrap
import typing

import tyro

from hybrid_jax.config import presets, recipes, text
from hybrid_jax.config.data import Source


@dataclasses.dataclass(frozen=True)
class Args:
    """List what `hybrid-jax train --recipe NAME` takes, or print one, a field a line."""

    name: typing.Annotated[str | None, tyro.conf.Positional] = None
    """The recipe to print in full; all are listed without one."""
    preset: str = "minimax-text-01"
    """The model to print it for."""
    budget: recipes.Budget = recipes.PUBLISHED
    """How much of it is affordable: the rest follows in proportion."""


def run(args: Args) -> int:
    """Print; exit code 0."""
    if args.name is None:
        for name in recipes.names():
            about = textwrap.wrap(recipes.about(name), 76)
            print(f"{name}\n" + "\n".join(f"    {line}" for line in about))
        return 0
    model = presets.get(args.preset)
    config = recipes.get(args.name, model, (Source(path="DATA"),), args.budget)
    lines = text.dump(config).splitlines()
    # The model is another command's.
    print("\n".join(line for line in lines if not line.startswith("model.pattern")))
    return 0
