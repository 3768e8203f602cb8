"""`hybrid-jax presets`: every preset with its size, or one in full."""

import dataclasses
import typing

import tyro

from hybrid_jax.config import presets, text


@dataclasses.dataclass(frozen=True)
class Args:
    """List the presets with their parameter counts, or print one, a field a line."""

    name: typing.Annotated[str | None, tyro.conf.Positional] = None
    """The preset to print in full; all are listed without one."""
    parameters: bool = False
    """Print the names and shapes of its parameters instead, for --tuning.train and the like."""


def run(args: Args) -> int:
    """Print; exit code 0."""
    if args.parameters:
        return _print_parameters(args.name)
    if args.name is not None:
        print(text.dump(presets.get(args.name)), end="")
        return 0
    from hybrid_jax import model

    for name in presets.names():
        config = presets.get(name)
        parameters = model.count(model.abstract(config))
        print(f"{name:<18} {parameters:>16,} parameters  {config.num_layers:>3} layers")
    return 0


def _print_parameters(name: str | None) -> int:
    if name is None:
        raise ValueError("--parameters needs a preset: hybrid-jax presets NAME --parameters")
    from hybrid_jax.checkpoint import leaves

    shapes = leaves.shapes(presets.get(name))
    width = max(map(len, shapes))
    for parameter, shape in shapes.items():
        print(f"{parameter:<{width}}  {list(shape)}")
    return 0
