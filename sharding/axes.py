"""The logical names of dimensions: the vocabulary in which parameters say what they are made of."""

import enum

Axis = str | tuple[str, ...]
"""A mesh axis, or several as one: in the order of the mesh, in which collectives number devices."""


class Logical(enum.Enum):
    """What a dimension of a parameter or an activation means."""

    LAYERS = "layers"
    """Stacked equal layers; never part of the mathematics."""
    BATCH = "batch"
    """Sequences of a batch (B)."""
    TIME = "time"
    """Tokens of a sequence (T)."""
    MODEL = "model"
    """Width of the residual stream (D)."""
    HEADS = "heads"
    """Query heads, or the heads of lightning attention (H)."""
    KV_HEADS = "kv_heads"
    """Key and value heads (G)."""
    HEAD_DIM = "head_dim"
    """Size of a key or value (K, V)."""
    PARTS = "parts"
    """Fused projections side by side: query, key, value; or gate, up."""
    EXPERTS = "experts"
    """Experts of a mixture (E)."""
    FFN = "ffn"
    """Hidden width of a feed-forward (F)."""
    RANK = "rank"
    """Between the two matrices of a low-rank correction; small, and never split."""
    VOCAB = "vocab"
    """Words of the vocabulary (W)."""
