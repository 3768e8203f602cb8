"""Names of our own, for models that no release has: the parameter's path with the layer's number.

`layers.3.mixer.qkv` is layer 3's block of the stacked parameter `stack.runs.<r>.mixer.qkv`.
"""

from hybrid_jax.checkpoint.names.places import places
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.config import model as model_lib

_STACK = "stack.runs."


def rules(config: model_lib.ModelConfig, leaves: dict[str, tuple[int, ...]]) -> list[Rule]:
    """One rule a layer of each stacked parameter in `leaves` (path to shape), one for the rest."""
    found = [
        Rule(path, shape, path) for path, shape in leaves.items() if not path.startswith(_STACK)
    ]
    for place in places(config):
        for path, shape in leaves.items():
            if path.startswith(f"{place.prefix}."):
                name = f"layers.{place.layer_idx}.{path.removeprefix(place.prefix + '.')}"
                found.append(Rule(name, shape[2:], path, place.index))
    return found
