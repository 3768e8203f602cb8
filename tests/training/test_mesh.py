"""A run on a mesh is the run on one device but for rounding, and goes on on any other mesh."""

import dataclasses
import io
import signal

import numpy as np
import pytest

from hybrid_jax import observe, training
from hybrid_jax.config import text
from hybrid_jax.config.parallel import Parallel
from tests.training import small

# Float32 sums in another order differ by 1e-7 in the first step. AdamW divides by the root of the
# second moment, so where a gradient is small its error grows to that of the update; over eight
# steps that reaches a few 1e-6 of the loss. A wrong row or gradient shows in the first digits.
TOLERANCE = 1e-5


def curve(path) -> np.ndarray:
    """(steps, losses, held-out losses) of a run, one row a step."""
    records = observe.read_metrics(path / "metrics.jsonl")
    return np.array([(r["step"], r["loss"], r.get("heldout_loss", 0.0)) for r in records])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Eight rows, so that a mesh may split them; rounds of accumulation, which deal rows anew."""
    words = small.write_text(tmp_path_factory.mktemp("text"))
    model = small.small_model(num_kv_heads=2)
    return small.small_run(words, model=model, batch_size=8, accumulate=2, steps=6)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The curve on one device."""
    path = tmp_path_factory.mktemp("alone") / "run"
    small.train(config, path, stream=io.StringIO())
    return curve(path)


def on(mesh: str, rules: str, config):
    return dataclasses.replace(config, parallel=Parallel(mesh=mesh, rules=rules))


def test_a_run_moves_from_mesh_to_mesh_and_back_to_one_device(config, alone, tmp_path):
    path = tmp_path / "run"
    first = on("data=2,fsdp=2,tensor=2", "fsdp_tensor", config)
    stream = small.Interrupting("step 1/6", signal.SIGTERM)
    assert training.train(first, path, stream=stream).step == 1
    second = on("fsdp=2,sequence=2,expert=-1", "long_context", config)
    training.train(second, path, resume=True, stream=io.StringIO())
    np.testing.assert_allclose(curve(path), alone, rtol=TOLERANCE)
    assert text.read_yaml(type(config), path / "config.yaml") == second
    model = training.restore_model(path)
    assert model.embedding.table[...].sharding.num_devices == 1
