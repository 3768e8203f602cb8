"""A save that dies or fails at any moment loses nothing that was whole before."""

import errno
import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.checkpoint import faults, manifest
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.state import TrainState
from tests.sharding import together
from tests.training import dying

# From here on the second of two checkpoints is whole.
WHOLE = ("manifest named", "retention", "deletion")


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_restores(checkpoints: CheckpointStore, step: int, state: TrainState) -> None:
    restored = checkpoints.restore(abstract(state))
    assert (restored.position, int(restored.state.step)) == (step, step)
    jax.tree.map(np.testing.assert_array_equal, restored.state.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.state.optimizer, state.optimizer)


@pytest.fixture
def fault():
    """Installs a hook for one test."""
    yield faults.install
    faults.install(None)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory a point, in which a process was killed there while it stored step 2."""
    directory = tmp_path_factory.mktemp("killed")
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.dying", "saves", directory],
        env=os.environ | {"PYTHONPATH": str(together.ROOT), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(run.stdout) == [-9] * len(faults.POINTS)
    return directory


@pytest.mark.parametrize("point", faults.POINTS)
def test_a_process_killed_at_any_point_leaves_a_whole_checkpoint(killed, point):
    directory = killed / point
    names = [path.name for path in directory.iterdir()]
    wanted, seed = (2, 2) if point in WHOLE else (1, 1)
    state = dying.state(seed, 16.0 if seed == 2 else 1.0)
    with CheckpointStore.reading(directory) as checkpoints:
        assert checkpoints.latest_step == wanted
        assert_restores(checkpoints, wanted, state)
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)
    if point == "arrays":
        assert any("orbax-checkpoint-tmp" in name for name in names)
    if point == "deletion":
        assert ".gone-1" in names and len([p for p in directory.rglob("*") if p.is_file()])
    # The run goes on: it stores that step, and nothing else is left.
    with CheckpointStore(directory, keep=1) as checkpoints:
        checkpoints.save(3, state, 3, "data")
        checkpoints.wait()
    assert [path.name for path in directory.iterdir()] == ["3"]
    manifest.verify(directory / "3")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("point", faults.POINTS)
def test_a_save_that_fails_at_any_point_is_reported_and_loses_nothing(
    point, number, tmp_path, fault
):
    def fail(reached):
        if reached == point:
            raise OSError(number, os.strerror(number))

    notes: list[str] = []
    first, second = dying.state(1, 0.1), dying.state(2, 0.1)
    with CheckpointStore(tmp_path, keep=1, note=notes.append) as checkpoints:
        checkpoints.save(1, first, 1, "data")
        checkpoints.wait()
        fault(fail)
        if point in ("retention", "deletion"):
            # Written it is; that the old one stays is no reason to say otherwise.
            checkpoints.save(2, second, 2, "data")
            checkpoints.wait()
            assert len(notes) == 1 and "/1 could not be removed" in notes[0]
            assert checkpoints.latest_step == 2
        else:
            with pytest.raises(OSError, match=rf"written .*{os.strerror(number)}.*make room"):
                checkpoints.save(2, second, 2, "data")
                checkpoints.wait()
            assert checkpoints.latest_step == 1
            whole = point in WHOLE
            with CheckpointStore.reading(tmp_path) as reader:
                assert_restores(reader, *((2, second) if whole else (1, first)))
        fault(None)
        # Training went on meanwhile.
        checkpoints.save(3, second, 3, "data")
        checkpoints.wait()
        assert_restores(checkpoints, 3, second)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_an_update_may_take_the_state_as_soon_as_save_returns(tmp_path, fault):
    """Hashing and writing see the state as it was, whatever the update does with its memory."""
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    wanted = jax.tree.map(np.array, dying.state(5, 32.0))
    state = dying.state(5, 32.0)
    overwrite(dying.state(6, 32.0))
    updated = threading.Event()
    # Nothing is hashed before the update is done.
    fault(lambda reached: updated.wait(60) if reached == "arrays" else None)
    with CheckpointStore(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, state, 5, "data")
        for _ in range(3):
            state = jax.block_until_ready(overwrite(state))
        updated.set()
        checkpoints.wait()
        assert_restores(checkpoints, 5, wanted)


@pytest.mark.parametrize(("next_step", "left"), [(2, ["1", "2"]), (4, ["1", "4"])])
def test_restoring_an_older_step_leaves_the_later_course(next_step, left, tmp_path):
    states = {step: dying.state(step, 0.1) for step in (1, 2, 3)}
    with CheckpointStore(tmp_path, keep=3) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, step, "data")
            checkpoints.wait()
        assert checkpoints.restore(abstract(states[1]), step=1).position == 1
        # Until there is a new one, nothing goes.
        assert checkpoints.latest_step == 1 and len(list(tmp_path.iterdir())) == 3
        checkpoints.save(next_step, states[3], 7, "data")
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        assert checkpoints.restore(abstract(states[1])).position == 7


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    whole=st.sets(st.integers(1, 9)),
    unfinished=st.sets(st.integers(1, 9)),
    bad=st.sets(st.integers(1, 9)),
    newest=st.integers(1, 9),
    keep=st.integers(1, 3),
)
def test_retention_keeps_the_newest_good_ones(
    tmp_path_factory, whole, unfinished, bad, newest, keep
):
    directory = tmp_path_factory.mktemp("retention")
    whole = whole | {newest}
    for step in whole | unfinished:
        (directory / str(step)).mkdir()
    for step in whole:
        (directory / str(step) / manifest.NAME).touch()
    with CheckpointStore(directory, keep) as checkpoints:
        checkpoints._bad = bad - {newest}
        checkpoints._retain(newest)
    left = {int(path.name) for path in directory.iterdir()}
    good = sorted(step for step in whole - (bad - {newest}) if step <= newest)
    assert left == set(good[-keep:]) and newest in left
