"""Models of random numbers, and how they lie on eight devices of one process or two."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.checkpoint import hf_config, leaves
from tests.checkpoint import published

# Every dim that may be split, over devices of one process ("near") and across processes ("far"): a
# tensor is then whole in one process, in rows of both, in columns of both, or in pieces of a fused
# dim. What is not listed is on all devices.
SPLIT = {
    "embedding.table": (("near", "far"), None),
    "head.kernel": ("far", "near"),
    "mixer.qkv": (None, None, "near", None, None, "far"),
    "mixer.gate": (None, None, "far", "near", None),
    "mixer.out": (None, None, "near", None, "far"),
    "mixer.q": (None, None, None, "near", "far"),
    "ffn.gate_up": (None, None, "near", None, None, "far"),
    "ffn.down": (None, None, "near", "far", None),
    "ffn.router": (None, None, None, "near"),
}


# 40 MB: two groups of Orbax, and twenty files of safetensors.
LARGE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_local_experts": 8,
    "head_dim": 64,
    "num_attention_heads": 4,
    "vocab_size": 4096,
}
SHARD_BYTES = 2_000_000


def model_of(seed=0, **changes):
    """Random numbers, the same wherever they are drawn."""
    values = published.original_config(**changes)
    draw = np.random.default_rng(seed)
    return leaves.fill(
        hf_config.describe(values, "config.json").model,
        lambda _, shape, dtype: draw.standard_normal(shape, np.float32).astype(dtype),
    )


def placed(model, devices):
    """The model on eight devices, four of each process."""
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("far", "near"))
    graph, state = nnx.split(model)

    def place(path, param):
        name = ".".join(map(str, path))
        spec = next((split for end, split in SPLIT.items() if name.endswith(end)), ())
        sharding, values = NamedSharding(mesh, PartitionSpec(*spec)), np.asarray(param[...])
        return param.replace(
            jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
        )

    flat = [(path, place(path, param)) for path, param in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
