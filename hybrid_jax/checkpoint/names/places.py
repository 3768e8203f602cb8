"""Where layer number n of a stack lies in our tree: its run and its place in the stacked arrays."""

import dataclasses

from hybrid_jax.config import layers as layers_lib
from hybrid_jax.config import model as model_lib


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer: its number, its kind, its parameters' prefix and its index in their stacks."""

    layer_idx: int
    layer: layers_lib.Layer
    prefix: str
    index: tuple[int, int]


def places(config: model_lib.ModelConfig) -> list[Place]:
    """Every layer in order."""
    found: list[Place] = []
    for repeat in range(config.repeats):
        for run_idx, run in enumerate(config.pattern):
            for position in range(run.count):
                prefix = f"stack.runs.{run_idx}"
                found.append(Place(len(found), run.layer, prefix, (repeat, position)))
    return found
