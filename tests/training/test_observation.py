"""What a run shows: environments, memories of lightning layers, event files, traces, efficiency."""

import dataclasses
import io
import json
import resource
import signal
import struct

import jax
import numpy as np
import pytest

from hybrid_jax import model as model_lib
from hybrid_jax import observe
from hybrid_jax.config.observation import Observation
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.model import flops
from hybrid_jax.targets import chips
from hybrid_jax.training import efficiency, environment, placing, state_norms
from hybrid_jax.training.feed import Feed
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from tests.training import small

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_norms_of_memories_are_those_of_a_rows_first_document_in_the_order_of_layers():
    lightning, softmax = small.small_model().pattern
    twice = dataclasses.replace(lightning, count=2)
    model = small.small_model(pattern=(twice, softmax), repeats=2)
    assert state_norms.layers_of(model) == [0, 1, 3, 4]
    skeleton = Skeleton(model)
    params = skeleton.named(model_lib.build(model))
    measure = state_norms.make_state_norms(skeleton)
    batch = small.random_batch(4, 32)
    norms = np.asarray(measure(params, batch))
    assert norms.shape == (4,) and (norms > 0).all()
    # What comes after the first document, and rows without a token, change nothing.
    tokens, segments = batch.tokens_BT.copy(), batch.segment_ids_BT.copy()
    tokens[:, 32 // 3 :] = 1
    np.testing.assert_array_equal(measure(params, batch._replace(tokens_BT=tokens)), norms)
    segments[3] = 0
    fewer = measure(params, batch._replace(segment_ids_BT=segments))
    three = batch._replace(tokens_BT=tokens[[0, 1, 2, 0]], segment_ids_BT=segments)
    # Experts sum their tokens in another order.
    np.testing.assert_allclose(measure(params, three), fewer, rtol=1e-6)
    # A layer without keys and values remembers nothing: the second of the second repeat.
    [name] = [name for name in skeleton.names if name.endswith("mixer.qkv") and "runs.0" in name]
    emptied = params | {name: params[name].at[1, 1].set(0.0)}
    assert (np.asarray(measure(emptied, batch)) == 0).tolist() == [False, False, False, True]


@pytest.mark.nightly  # two programs more
def test_norms_of_memories_are_the_same_on_a_mesh():
    model = small.small_model(num_kv_heads=2)
    config = small.small_run(model=model)
    skeleton, batch, norms = Skeleton(model), small.random_batch(4, 32), []
    optimizer = Optimizer(config, skeleton.axes)
    for mesh, devices in (("data=1", 1), ("data=2,tensor=2", 4)):
        parallel = Parallel(mesh=mesh, rules="fsdp_tensor")
        placement = placing.make(parallel, jax.devices()[:devices])
        params = initial_state(config, skeleton, optimizer, placement).params
        measure = state_norms.make_state_norms(skeleton, placement)
        norms.append(np.asarray(measure(params, Feed(placement, 4, 32).place(batch))))
    # Sums of float32 numbers in another order.
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


def test_a_mesh_that_cannot_decode_is_said_once():
    class Heldout:
        first_batch = small.random_batch(4, 32)
        feed = Feed(placing.make(Parallel(mesh="fsdp=2"), jax.devices()[:2]), 4, 32)

    notes: list[str] = []
    config = small.small_run(observation=Observation())
    skeleton = Skeleton(config.model)
    placement = placing.make(Parallel(mesh="fsdp=2"), jax.devices()[:2])
    measure = state_norms.StateNorms(config, skeleton, placement, notes.append)
    for _ in range(2):
        assert measure(skeleton.abstract, Heldout()) == {}
    assert len(notes) == 1 and "not measured: The rules 'fsdp' keep parameters in" in notes[0]


def test_event_files_traces_and_environments_of_a_run_that_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(observe.progress, "_SECONDS_BETWEEN_LINES", 0)
    words = small.write_text(tmp_path)
    shown = Observation(tensorboard=True, profile_at=2, profile_steps=1)
    config = small.small_run(words, observation=shown)
    path, stream = tmp_path / "run", small.Interrupting("step 4/8", signal.SIGTERM)
    small.train(config, path, stream=stream)
    records = observe.read_metrics(path / "metrics.jsonl")
    [norm] = records[-1]["state_norms"]
    assert len(records) == 4 and norm > 0
    assert all(record["peak_memory_bytes"] > 1 << 20 for record in records)
    assert list((path / "profile").rglob("*.xplane.pb"))
    assert f"A profile is in {path / 'profile'}" in stream.getvalue()
    assert events(path)["loss"] == [(r["step"], pytest.approx(r["loss"])) for r in records]

    # Continued: the steps of before stay, none is there twice.
    small.train(config, path, resume=True, stream=io.StringIO())
    assert [step for step, _ in events(path)["loss"]] == list(range(1, 9))
    assert [step for step, _ in events(path)["state_norms/0"]] == [4, 8]
    starts = environment.read(path / "environment.json")
    assert [start["step"] for start in starts] == [0, 4]


def events(path) -> dict:
    """(step, value) by curve, of all event files, as TensorBoard reads them."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[str, dict] = {}
    for file in sorted((path / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            # TFRecord: length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                for curve in found.values():
                    for step in [step for step in curve if step >= event.step]:
                        del curve[step]
            for value in event.summary.value:
                curve = found.setdefault(value.tag, {})
                assert event.step not in curve
                curve[event.step] = value.simple_value
    return {name: sorted(curve.items()) for name, curve in found.items()}


def test_a_changed_environment_is_listed_when_a_run_goes_on(tmp_path, monkeypatch):
    file, notes = tmp_path / "environment.json", []
    environment.store(file, 0, notes.append)
    environment.store(file, 5, notes.append)
    assert notes == []
    real = environment.describe()
    monkeypatch.setattr(environment, "describe", lambda: real | {"jax": "9.9", "sources": "other"})
    environment.store(file, 7, notes.append)
    [note] = notes
    assert f"  jax: {real['jax']}  (now: 9.9)" in note and "  sources: " in note
    assert "numpy" not in note
    assert [start["step"] for start in environment.read(file)] == [0, 5, 7]
    for text in ("{", "[1]", '[{"step": "x"}]', json.dumps([{"step": 1, "environment": 3}])):
        file.write_text(text)
        environment.store(file, 8, notes.append)
        assert "is damaged and begun again" in notes[-1]
        assert len(environment.read(file)) == 1


def test_model_flops_utilisation_is_what_a_plan_would_say():
    model, chip = small.small_model(), chips.CHIPS["tpu7x"]

    class Device:
        device_kind = chip.device_kind

    # Two devices make a chip.
    found = efficiency.Efficiency(model, 64, [Device()] * 4).mfu(tokens=100, seconds=1e-6)
    wanted = 3 * flops.forward_flops(model, 32) * 100 / 1e-6 / (2 * chip.bf16_flops)
    assert found == {"mfu": pytest.approx(wanted)}
    assert efficiency.Efficiency(model, 64, jax.devices()).mfu(100, 1.0) == {}


def test_what_cannot_be_written_is_written_later_to_the_byte(tmp_path):
    """No file may grow beyond a limit for a while: what a full disk does, without filling one."""
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with observe.MetricsFile(path) as metrics:
        metrics.append({"step": 1, "loss": 1.0, "by_source": [1.0, float("nan")]})
        # In the midst of the next line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, limits[1]))
        try:
            for step in (2, 3):
                metrics.append({"step": step, "loss": 1.0})
                assert metrics.problem is not None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [record["step"] for record in observe.read_metrics(path)] == [1]
        metrics.append({"step": 4, "loss": 1.0})
        assert metrics.problem is None
    records = observe.read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["by_source"] == [1.0, None]


def test_without_the_extra_the_way_out_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = small.small_run(tmp_path, observation=Observation(tensorboard=True))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hybrid-jax\[tensorboard\]'"):
        small.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
