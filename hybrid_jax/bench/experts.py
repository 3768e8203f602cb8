"""The experts of a layer as `schedule_of` compiles them: the reference shapes and their work."""

import jax
import jax.numpy as jnp

from hybrid_jax.targets.chips import CHIPS, Chip
from pallas_kernels.grouped_matmul.pallas_tpu.visits import Even
from pallas_kernels.grouped_swiglu import pallas_tpu

# MiniMax-Text-01: four of 32 experts on a chip, as many rows for each.
GROUPS, ROWS, WIDTH, HIDDEN = 4, 4096, 6144, 9216


def forward(groups: int, chip: str, rows=ROWS, width=WIDTH, hidden=HIDDEN):
    """The op where a gradient is wanted: what the backward pass needs is written too.

    Groups have `rows` rows each, 256 or 512 times a power of two.
    """
    x, gate_up, down = _arrays(groups, rows, width, hidden)

    def run(x, gate_up, down):
        return pallas_tpu.forward(x, gate_up, down, Even(groups, rows), None)

    return _known(chip, run), (x, gate_up, down)


def backward(groups: int, chip: str, rows=ROWS, width=WIDTH, hidden=HIDDEN):
    """The gradients of x and of the matrices from what `forward` left."""
    x, gate_up, down = _arrays(groups, rows, width, hidden)

    def run(x, gate_up, down, act, dout):
        # Its memory is reused, which of an argument would cost a copy.
        kept = jax.lax.empty((2, *act.shape), act.dtype)
        return pallas_tpu.backward(
            x, gate_up, down, Even(groups, rows), None, kept, act, dout
        )  # fmt: skip

    act = jax.ShapeDtypeStruct((x.shape[0], hidden), x.dtype)
    return _known(chip, run), (x, gate_up, down, act, x)


def ideal_ms(kind: str, chip: Chip) -> float:
    """FLOPs of the products, three forward and six backward, at the chip's peak."""
    products = {"forward": 3, "backward": 6}[kind]
    return 2 * products * GROUPS * ROWS * WIDTH * HIDDEN / chip.bf16_flops * 1e3


def _arrays(groups: int, rows: int, width: int, hidden: int):
    shapes = (groups * rows, width), (groups, width, 2 * hidden), (groups, hidden, width)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


def _known(name: str, run):
    """The function where a mesh says what it is compiled for, as it does in `jax.shard_map`."""
    chip = CHIPS[name]
    device = jax.sharding.AbstractDevice(chip.device_kind, chip.cores_per_device, chip.platform)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)

    def known(*arrays):
        with jax.sharding.use_abstract_mesh(mesh):
            return run(*arrays)

    return known
