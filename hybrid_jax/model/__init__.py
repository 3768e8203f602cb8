"""The hybrid model: pure single-device code over arrays, owned by thin Flax NNX modules."""

from hybrid_jax.model.model import Hidden as Hidden
from hybrid_jax.model.model import Model as Model
from hybrid_jax.model.model import abstract as abstract
from hybrid_jax.model.model import build as build
from hybrid_jax.model.params import count as count
from hybrid_jax.model.params import logical_axes as logical_axes
from hybrid_jax.model.params import size_in_bytes as size_in_bytes
from hybrid_jax.model.state import DecodeState as DecodeState
