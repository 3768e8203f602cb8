"""Released models decode with weights in eight bits, say compilers for devices that are not here.

On half of the GPUs that bfloat16 needs. TPUs need as many as for bfloat16, for now.
"""

import dataclasses
import math
import re

import jax
import pytest

from hybrid_jax import inference, targets
from hybrid_jax.config import presets
from hybrid_jax.inference import shapes
from hybrid_jax.model.parallel import placement as placements
from tests import aot

pytestmark = pytest.mark.aot
ROWS, CAPACITY = 8, 8192


def _decode(config, scheme, target, mesh):
    """(compiled step, its quantised parameters, its state, the parameters in bfloat16)."""
    placement = placements.make(mesh, "serve", aot.devices(target))
    arguments = shapes.decode_arguments(config, ROWS, CAPACITY, placement, quantize=scheme)
    compiled = inference.make_decode_step(config, placement).lower(*arguments).compile()
    return compiled, arguments[0], arguments[2], shapes.parameters(config, placement)


def _bytes(tree) -> int:
    """Of one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


def _experts_of(params):
    """Values of the first run's experts, joined and down, as one device has them: shapes."""
    ffn = params["stack"]["runs"][0]["ffn"]
    values = (ffn[name].get_raw_value().qvalue for name in ("gate_up", "down"))
    return [x.sharding.shard_shape(x.shape) for x in values]


@pytest.mark.parametrize(
    ("preset", "scheme", "target", "mesh"),
    [
        ("minimax-text-01", "int8", "h200:4", "tensor=4"),
        ("minimax-m2", "fp8", "h200:2", "tensor=2"),
    ],
)
def test_half_of_the_gpus_hold_a_release_and_widen_one_expert_at_a_time(
    preset, scheme, target, mesh
):
    config = presets.get(preset)
    compiled, params, state, wide = _decode(config, scheme, target, mesh)
    memory = compiled.memory_analysis()
    # Half, and scales, head and embedding.
    assert memory.argument_size_in_bytes - _bytes(state) < 0.51 * _bytes(wide)
    # One expert in float32, one layer's caches cut out, and the rows' activations and logits. The
    # experts of one layer would be 2.7 and 3.6 GB in bfloat16.
    expert = 4 * sum(math.prod(shape[3:]) for shape in _experts_of(params))
    assert memory.temp_size_in_bytes < expert + _bytes(state) / config.num_layers + 2**24
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert held <= 0.92 * targets.CHIPS["h200"].hbm_bytes


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_tpu_widens_one_layer_at_a_time_but_lays_out_all_layers_anew(scheme):
    # Four of M2's 62 layers.
    config = dataclasses.replace(presets.get("minimax-m2"), repeats=4)
    compiled, params, state, wide = _decode(config, scheme, "v5p:2x2x1", "tensor=4")
    memory = compiled.memory_analysis()
    # Of four layers head and embedding, which stay as they are, are 5 % in bfloat16.
    assert memory.argument_size_in_bytes - _bytes(state) < 0.55 * _bytes(wide)
    gate_up, down = (math.prod(shape) for shape in _experts_of(params))
    found = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in found) <= gate_up / 4
    # The compiler takes bytes from outside in tiles of 32 rows, and has them in tiles of 8 inside
    # the loop over layers: all are copied once. Beside these there is one layer cut out, joined,
    # and in bfloat16 or, of FP8, its scales for each value.
    copies, layer = gate_up + down, (gate_up + down) / 4
    assert memory.temp_size_in_bytes < copies + (1 + 1 + 4) * layer
