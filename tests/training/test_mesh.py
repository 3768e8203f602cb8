"""A run on a mesh is the run on one device but for rounding, and goes on on any other mesh."""

import dataclasses
import io
import signal

import jax
import numpy as np
import pytest

from hybrid_jax import observe, training
from hybrid_jax.config import parallel, text
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.training import loop, placing
from sharding import mesh as mesh_lib
from sharding import rules
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


@pytest.mark.parametrize(
    ("mesh", "rules", "changes", "message"),
    [
        ("data=2,fsdp=3", "fsdp", {}, r"data=2 x fsdp=3 x .* has 6 devices; there are 8"),
        ("fsdp=-1,tensor=3", "fsdp", {}, "leaves 8 / 3 devices for fsdp"),
        ("fsdp=4,tensor=2", "fsdp", {}, "split nothing over tensor"),
        (
            "data=2,fsdp=4",
            "fsdp",
            {"batch_size": 8, "accumulate": 2},
            r"batch_size=8 in accumulate=2 rounds gives 4 rows, which do not divide by "
            r"data=2 x fsdp=4 = 8 .*multiple of 16",
        ),
        ("sequence=8", "long_context", {}, "sequence_length=40 does not divide by 2 x sequence=8"),
        ("tensor=8", "fsdp_tensor", {}, r"dim heads of 2 does not divide by tensor=8"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, mesh, rules, changes, message
):
    text_files = tmp_path / "text"
    text_files.mkdir()
    config = small.small_run(small.write_text(text_files), **{"batch_size": 8} | changes)
    config = dataclasses.replace(
        on(mesh, rules, config), data=dataclasses.replace(config.data, sequence_length=40)
    )
    monkeypatch.setattr(loop, "open_run", None)
    with pytest.raises(ValueError, match=message):
        training.train(config, tmp_path / "run", stream=io.StringIO())


@pytest.mark.parametrize(
    ("batch_size", "devices", "size", "said"),
    [
        (8, 8, 8, "Using all 8 devices, on the axis fsdp; --mesh chooses otherwise."),
        (4, 8, 4, "Using 4 of 8 devices, on the axis fsdp: rows or widths do not divide by more"),
        (3, 8, 1, "Using 1 of 8 devices"),
        (8, 1, 1, ""),
    ],
)
def test_without_a_mesh_all_devices_that_divide_the_rows_are_used(batch_size, devices, size, said):
    notes: list[str] = []
    config = small.small_run(batch_size=batch_size)
    placement = placing.choose(config, jax.devices()[:devices], notes.append)
    assert (1 if placement is None else placement.shape.fsdp) == size
    assert "".join(notes).startswith(said) and len(notes) == bool(said)


def test_the_configuration_knows_the_axes_and_rules_there_are():
    assert (*mesh_lib.AXES, "slices") == parallel.AXES
    assert tuple(rules.PRESETS) == parallel.RULES


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("", "fsdp", "names the axis ''"),
        ("tensr=2", "fsdp", "names the axis 'tensr'.*Did you mean 'tensor'"),
        ("data=2,data=4", "fsdp", "names the axis 'data' twice"),
        ("data=0", "fsdp", "gives data the size '0'"),
        ("data=1.5", "fsdp", "gives data the size '1.5'"),
        ("data=2", "fdsp", "must be one of .*; got 'fdsp'. Did you mean 'fsdp'"),
    ],
)
def test_a_mesh_is_checked_where_no_device_is_needed(mesh, rules, message):
    with pytest.raises(ValueError, match=message):
        Parallel(mesh=mesh, rules=rules)


def test_options_of_experts_reach_the_placement():
    chosen = Parallel(
        mesh="fsdp=2,expert=4", rules="expert", capacity_per_device=1.5, token_groups=2
    )
    config = dataclasses.replace(small.small_run(batch_size=8), parallel=chosen)
    found = placing.choose(config, jax.devices(), print)
    assert found is not None
    assert found.experts.token_groups == 2 and found.experts.capacity.per_device == 1.5
    odd = dataclasses.replace(config, parallel=dataclasses.replace(chosen, token_groups=7))
    with pytest.raises(ValueError, match="do not divide into token_groups=7"):
        placing.choose(odd, jax.devices(), print)
    with pytest.raises(ValueError, match="capacity_per_device is a multiple"):
        dataclasses.replace(chosen, capacity_per_device=0.0)
