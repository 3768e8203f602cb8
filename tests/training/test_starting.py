"""A run begins with the weights of another, and what LoRA learnt leaves it as plain weights."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest

import hybrid_jax
from hybrid_jax import checkpoint, training
from hybrid_jax.checkpoint import leaves, loading, parts
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.config import text
from hybrid_jax.config import training as t
from hybrid_jax.config.layers import SoftmaxAttention
from hybrid_jax.config.model import Dtypes
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training import fingerprint, starting
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import abstract_state, initial_state
from tests.checkpoint import large, published
from tests.training import small


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    words = small.write_text(tmp_path_factory.mktemp("text"))
    config = small.small_run(words, model=small.dense_model(), steps=2, optimizer=t.Muon())
    # Nothing to evaluate on, and so no program for it.
    return dataclasses.replace(config, data=dataclasses.replace(config.data, heldout_fraction=0.0))


@pytest.fixture(scope="module")
def base(base_config, tmp_path_factory):
    """A run of two steps."""
    path = tmp_path_factory.mktemp("base") / "run"
    small.train(base_config, path, stream=io.StringIO())
    return path


def begin(config, mesh: str = ""):
    """(state, origin, notes) of a run with this configuration."""
    skeleton = Skeleton(config.model, config.tuning)
    optimizer = Optimizer(config, skeleton.axes)
    placement = placements.make(mesh, "fsdp_tensor") if mesh else None
    notes: list[str] = []
    state, origin = starting.begin(config, skeleton, optimizer, placement, notes.append)
    return state, origin, "".join(notes)


def stored(config, path, step=None):
    skeleton = Skeleton(config.model, config.tuning)
    optimizer = Optimizer(config, skeleton.axes)
    with CheckpointStore.reading(path / "checkpoints") as checkpoints:
        return checkpoints.restore(abstract_state(skeleton, optimizer), step).state


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def from_run(config, base, **changes):
    return dataclasses.replace(config, start=t.Start(path=str(base)), **changes)


@pytest.mark.parametrize("mesh", ["", "fsdp=4,tensor=2"])
def test_weights_come_as_they_are_to_where_they_belong(base_config, base, mesh):
    mixer = base_config.model.layers[0].mixer
    assert isinstance(mixer, SoftmaxAttention)
    layer = dataclasses.replace(
        base_config.model.layers[0], mixer=dataclasses.replace(mixer, rope_theta=5e6)
    )
    run = dataclasses.replace(base_config.model.pattern[0], layer=layer)
    longer = dataclasses.replace(base_config.model, pattern=(run,), max_positions=1 << 20)
    config = from_run(base_config, base, model=longer)
    state, origin, notes = begin(config, mesh)
    # One that begins with the same elsewhere is told as such.
    same = fingerprint.Fingerprint()
    for name, array in stored(base_config, base).params.items():
        same.add(name, array.shape, Box.whole(array.shape), np.asarray(array))
    assert origin.digest == same.digest(state.params)
    assert_same(state.params, stored(base_config, base).params)
    assert int(state.step) == 0
    # Moments are new.
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1)
    assert origin.step == 2 and f"{base} at step 2 (digest {origin.digest})" in notes
    assert [line.split(" =")[0] for line in origin.differences] == [
        "model.pattern[0].layer.mixer.rope_theta",
        "model.max_positions",
    ]
    assert "rope_theta = 5000000.0, there 10000.0" in notes
    if mesh:
        spec = state.params["stack.runs.0.ffn.down"].sharding.spec
        assert tuple(spec) == (None, None, "tensor", "fsdp")


def test_moments_come_along_if_they_fit(base_config, base):
    start = t.Start(path=str(base), moments=True)
    state, _, _ = begin(dataclasses.replace(base_config, start=start))
    wanted = stored(base_config, base)
    assert_same((state.params, state.optimizer), (wanted.params, wanted.optimizer))
    assert int(state.step) == 0
    with pytest.raises(ValueError, match=r"(?s)needs the same optimizer.*'Muon'.*'AdamW'"):
        begin(dataclasses.replace(base_config, start=start, optimizer=t.AdamW()))
    with pytest.raises(ValueError, match=r"(?s)needs the same tuning.*'Full'.*'Frozen'"):
        tuning = t.Frozen(train=("*.ffn.*",))
        begin(dataclasses.replace(base_config, start=start, tuning=tuning))


def test_every_parameter_that_differs_is_listed(base_config, base):
    wider = dataclasses.replace(base_config.model, hidden_dim=64, tie_embeddings=True)
    with pytest.raises(ValueError) as error:
        begin(from_run(base_config, base, model=wider))
    lines = str(error.value).splitlines()[1:-1]
    assert "  head.kernel: there [32, 320], here absent" in lines
    assert "  norm.scale: there [32], here [64]" in lines
    assert len(lines) == len(Skeleton(base_config.model).names)
    with pytest.raises(ValueError, match=r"no checkpoint of step 1; it has \[2\]"):
        begin(dataclasses.replace(base_config, start=t.Start(path=str(base), step=1)))
    with pytest.raises(ValueError, match="does not exist"):
        begin(from_run(base_config, base / "none"))


def test_a_fine_tuned_run_needs_its_origin_once_and_resumes_exactly(base_config, base, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(base, origin)
    tuning = t.LoRA(rank=2, targets=("*.mixer.*",))
    changes = {"steps": 4, "checkpoints": t.Checkpoints(every=2, keep=3)}
    config = from_run(base_config, origin, tuning=tuning, **changes)
    (origin / "tokenizer.json").write_text("{}")
    stream = io.StringIO()
    small.train(config, tmp_path / "run", stream=stream)
    said = " ".join(stream.getvalue().split())
    assert "is not the tokenizer of this run" in said
    kept = json.loads((tmp_path / "run" / "start.json").read_text())
    assert kept["path"] == str(origin) and kept["step"] == 2 and kept["differences"] == []
    whole = stored(config, tmp_path / "run")
    # What does not learn has the bits of the run it came from.
    for name, array in stored(base_config, base).params.items():
        np.testing.assert_array_equal(whole.params[name], array)

    shutil.rmtree(origin)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    small.train(config, tmp_path / "run", resume=True, stream=io.StringIO())
    assert_same(stored(config, tmp_path / "run"), whole)

    # The run alone gives the merged model, to every command that reads one.
    merged = leaves.arrays(hybrid_jax.load(tmp_path / "run"))
    restored = leaves.arrays(training.restore_model(tmp_path / "run"))
    for name, array in restored.items():
        # A sum of two float32 products in another order.
        np.testing.assert_allclose(merged[name], array, rtol=1e-5, atol=1e-7, err_msg=name)
    moved = np.abs(merged["stack.runs.0.mixer.q"] - whole.params["stack.runs.0.mixer.q"])
    assert moved.max() > 1e-4
    with pytest.raises(ValueError, match="origin does not exist"):
        small.train(config, tmp_path / "other", stream=io.StringIO())
    assert not (tmp_path / "other").exists()


def test_a_mixture_tuned_by_lora_is_published_merged(tmp_path):
    config = small.small_run(tuning=t.LoRA(rank=2, alpha=3.0))
    skeleton = Skeleton(config.model, config.tuning)
    optimizer = Optimizer(config, skeleton.axes)
    state = initial_state(config, skeleton, optimizer)
    rng = np.random.default_rng(0)
    for name, array in state.params.items():
        if name.endswith(".lora_b"):
            learnt = rng.normal(size=array.shape).astype(np.float32)
            state.params[name] = jax.device_put(learnt, array.sharding)
    run = tmp_path / "run"
    with CheckpointStore(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state, 0, "none")
        checkpoints.wait()
    text.write_yaml(config, run / "config.yaml")
    expected = leaves.arrays(hybrid_jax.load(run))
    name = "stack.runs.1.ffn.down"
    by_hand = np.asarray(state.params[name], np.float64) + 1.5 * np.einsum(
        "nceir,ncerj->nceij",
        *(np.float64(state.params[name + end]) for end in (".lora_a", ".lora_b")),
    )
    np.testing.assert_allclose(expected[name], by_hand, rtol=1e-5, atol=1e-6)
    for format in ("hf", "hf-original", "orbax"):
        checkpoint.convert(run, tmp_path / format, format)
        found = leaves.arrays(hybrid_jax.load(tmp_path / format))
        assert_same(found, expected)
    # What was published starts the next run, and so does the run itself.
    plain = dataclasses.replace(config, tuning=t.Full())
    for directory, step in (("hf", None), ("run", 1)):
        state, origin, _ = begin(from_run(plain, tmp_path / directory))
        assert_same(state.params, expected)
        assert origin.step == step


MEASURE = """
import dataclasses, json, pathlib, sys, types
from hybrid_jax.checkpoint import loading, parts
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.config.model import Dtypes
from hybrid_jax.config.start import Start
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training import starting
from hybrid_jax.training.parameters import Skeleton
parts.PIECE_BYTES, loading.HOST_BYTES = 1 << 18, 0
placement = placements.make("expert=2", "expert")
def read(path):
    with open_checkpoint(path) as checkpoint:
        dtypes = Dtypes(parameters="bfloat16", compute="bfloat16")
        model = dataclasses.replace(checkpoint.config, dtypes=dtypes)
    config = types.SimpleNamespace(model=model)
    return starting._read(config, Start(path=path), Skeleton(model), placement)[0]
def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
# Libraries and compilers are there before the measurement.
read(sys.argv[1])
# The peak of a process begins with that of the one that started it: forget it.
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
params = read(sys.argv[2])
held = sum(shard.data.nbytes for a in params.values() for shard in a.addressable_shards)
print(json.dumps({"more": (status("VmHWM") - before) / 1024 - held * 2.0**-20,
                  "stack": max(a.nbytes for a in params.values()) * 2.0**-20}))
"""


def test_no_parameter_is_put_together_in_host_memory(tmp_path, monkeypatch):
    large.write(tmp_path / "large", 2, 4)
    monkeypatch.setattr(parts, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(loading, "HOST_BYTES", 0)
    with open_checkpoint(tmp_path / "large") as opened:
        model = dataclasses.replace(opened.config, dtypes=Dtypes(parameters="bfloat16"))
    config = from_run(small.small_run(model=model), tmp_path / "large")
    assert config.start is not None
    # Counts the memory of numpy and Python, not that of devices.
    tracemalloc.start()
    params = starting._read(config, config.start, Skeleton(model), None)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Nine pieces of 256 KiB ahead, each once more while it is turned, 2 MiB for what the digest
    # widens, and what JAX keeps of its programs.
    assert max(array.nbytes for array in params.values()) == 32 << 20
    assert peak < 12 << 20, peak


@pytest.mark.nightly
def test_a_start_holds_a_few_pieces_and_never_a_stack(tmp_path):
    config = published.original_config(num_local_experts=4)
    tiny = published.write_directory(tmp_path / "tiny", config, published.tensors(config))
    large.write(tmp_path / "large", 3, 8)
    # A user's process: the tests' eight devices have threads and memory pools of their own.
    plain = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", MEASURE, str(tiny), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    # As in `test_loading.py`: pieces of eight threads, and XLA's programs.
    assert report["more"] < 96 < report["stack"], report
