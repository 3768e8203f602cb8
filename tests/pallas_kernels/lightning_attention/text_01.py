"""What a lightning layer of MiniMax-Text-01 hands the op, and how good bfloat16 kernels must be."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.lightning_attention.cases import Case
from scripts import rounding
from tests.pallas_kernels.lightning_attention import contract, oracle


def slopes(layer: int, heads) -> np.ndarray:
    """Some heads' slopes; the model has 64 heads and 80 layers."""
    return (2.0 ** (-8 * (np.asarray(heads) + 1) / 64) * (1 - layer / 79 + 1e-5)).astype(np.float32)


def make_inputs(case: Case, slopes, ids=None, dtype=jnp.bfloat16) -> contract.Inputs:
    """What a layer sees: silu of normal numbers, and normal gradients."""
    inputs = contract.make_inputs(case, ids)
    silu = {name: x / (1 + jnp.exp(-x)) for name, x in zip("qkv", inputs[:3], strict=True)}
    inputs = inputs._replace(**silu, log_decay=-slopes)
    return inputs._replace(
        **{name: getattr(inputs, name).astype(dtype) for name in ("q", "k", "v", "dout")}
    )


def assert_as_good_as_rounding(found: oracle.Results, expected: oracle.Results, slopes) -> None:
    """Errors by head, in units of rounding the exact result to bfloat16."""
    for name, limits_H in rounding.limits(slopes).items():
        ours, exact = (np.moveaxis(getattr(x, name), 2, 0) for x in (found, expected))
        errors_H = np.asarray([rounding.error(*head) for head in zip(ours, exact, strict=True)])
        assert (errors_H <= limits_H).all(), (name, errors_H)
