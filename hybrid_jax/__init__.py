"""The MiniMax family of hybrid-attention language models in JAX; names here load on first use."""

import importlib
import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from hybrid_jax.checkpoint import load, save
    from hybrid_jax.config import presets
    from hybrid_jax.inference import generate

__all__ = ["__version__", "generate", "load", "presets", "save"]

# name -> where it lives; None as attribute means the module itself. Resolved on first use, so that
# `import hybrid_jax` costs milliseconds and reads no JAX.
_LAZY = {
    "load": ("hybrid_jax.checkpoint", "load"),
    "save": ("hybrid_jax.checkpoint", "save"),
    "generate": ("hybrid_jax.inference", "generate"),
    "presets": ("hybrid_jax.config.presets", None),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hybrid_jax' has no attribute {name!r}; it has {__all__}.")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
