"""Array kernels: local arrays in, local arrays out; one op a folder, several implementations each."""

from importlib import import_module
from typing import Any

_FOLDER_OF = {
    "lightning_attention": "lightning_attention",
    "lightning_decode": "lightning_attention",
    "grouped_matmul": "grouped_matmul",
    "softmax_attention": "softmax_attention",
}

__all__ = list(_FOLDER_OF)


def __getattr__(name: str) -> Any:
    """Import an op on first use, so that one op's imports do not burden another's users."""
    if name not in _FOLDER_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = getattr(import_module(f"{__name__}.{_FOLDER_OF[name]}"), name)
    globals()[name] = op
    return op
