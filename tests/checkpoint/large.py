"""A directory large enough that what is held of it shows in the memory of a process."""

import json

import ml_dtypes
import numpy as np

from hybrid_jax.checkpoint import hf_config
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsLayout
from hybrid_jax.checkpoint.names import minimax
from tests.checkpoint import published


def write(path, layers: int, experts: int) -> int:
    """A directory of experts of 4 MiB, which are most of its bytes; how many these are."""
    values = published.original_config(
        "l" * (layers - 1) + "s",
        hidden_size=1024,
        intermediate_size=2048,
        num_local_experts=experts,
        head_dim=128,
        num_attention_heads=8,
        vocab_size=2048,
    )
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    rules = minimax.rules(hf_config.describe(values, "config.json").model)
    infos = [TensorInfo(rule.name, "BF16", rule.shape) for rule in rules]
    layout, draw = SafetensorsLayout(infos), np.random.default_rng(0)
    for unit in layout.units:
        arrays = (
            draw.standard_normal(info.shape, np.float32).astype(ml_dtypes.bfloat16)
            for info in unit.infos
        )
        layout.write(path, unit.number, arrays)
    layout.finish(path, {})
    return sum(info.nbytes for info in infos)
