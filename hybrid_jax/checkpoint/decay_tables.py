"""The decay tables that transformers stores with every lightning layer."""

import numpy as np

from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.config import layers as layers_lib
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model import decay


def infos(config: ModelConfig, block_size: int) -> dict[str, tuple[TensorInfo, int]]:
    """Name -> (dtype and shape, layer) of every table of a model, in float32."""
    found = {}
    for layer_idx, layer in enumerate(config.layers):
        if not isinstance(layer.mixer, layers_lib.LightningAttention):
            continue
        heads = layer.mixer.num_heads
        for kind, shape in (
            ("slope_rate", (heads, 1, 1)),
            ("query_decay", (heads, block_size, 1)),
            ("key_decay", (heads, block_size, 1)),
            ("diagonal_decay", (1, heads, block_size, block_size)),
        ):
            name = f"model.layers.{layer_idx}.self_attn.{kind}"
            found[name] = TensorInfo(name, "F32", shape), layer_idx
    return found


def table(name: str, config: ModelConfig, layer_idx: int, shape: tuple[int, ...]) -> np.ndarray:
    """One table, as `MiniMaxLightningAttention` of transformers 5.23 computes it, in float32.

    transformers runs what the file holds, so head counts that are no power of two get the slopes of
    the released code here, which transformers itself would not choose.
    """
    heads, kind = config.layers[layer_idx].mixer.num_heads, name.rsplit(".", 1)[1]
    block_size = shape[-2]
    # transformers' layer factor; its 1e-5 in the denominator moves slopes by 1e-5 at most.
    factor = 1 - layer_idx / (config.num_layers - 1 + 1e-5) + 1e-5
    slope_H11 = (decay.head_slopes(heads) * factor).astype(np.float32)[:, None, None]
    step_C1 = np.arange(1, block_size + 1, dtype=np.float32)[:, None]
    if kind == "slope_rate":
        return slope_H11
    if kind == "query_decay":
        return np.exp(-slope_H11 * step_C1)
    if kind == "key_decay":
        return np.exp(-slope_H11 * (block_size - step_C1))
    distance_HCC = slope_H11 * (step_C1 - step_C1.T)
    return np.exp(np.where(distance_HCC >= 0, -distance_HCC, -np.inf))[None]
