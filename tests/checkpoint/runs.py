"""Training runs as their directories look, without training."""

import pathlib

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybrid_jax.checkpoint import digests, leaves, manifest
from hybrid_jax.config import recipes, text
from hybrid_jax.config.data import Source


def parameters(seed: int = 0) -> dict:
    """Random parameters of the preset `nano`, by name."""
    draw = np.random.default_rng(seed)
    shapes = leaves.shapes(recipes.of_preset("nano", (Source(path="text"),)).model)
    return {
        name: jnp.asarray(draw.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def write_step(run, step: int, params: dict) -> None:
    """One checkpoint with its manifest."""
    place = pathlib.Path(run) / "checkpoints" / str(step)
    ocp.save_checkpointables(place, {"params": params, "optimizer": {"m": jnp.ones(3)}})
    held = digests.hold({f"params/{name}": array for name, array in params.items()})
    manifest.write(place, digests.describe(held))


def run_directory(path, steps=(9, 10)) -> pathlib.Path:
    """A run of the preset `nano` with checkpoints of the same parameters."""
    params = parameters()
    for step in steps:
        write_step(path, step, params)
    text.write_yaml(recipes.of_preset("nano", (Source(path="text"),)), path / "config.yaml")
    return path
