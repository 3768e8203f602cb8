"""A damaged or unfinished checkpoint is named and never restored; good ones before it are kept."""

import io
import shutil

import numpy as np
import pytest

from hybrid_jax.checkpoint import manifest
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import abstract_state, initial_state
from tests.training import small


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small.small_run(small.write_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def parts(config):
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    state = initial_state(config, skeleton, optimizer)
    return abstract_state(skeleton, optimizer), state


@pytest.fixture(scope="module")
def stored(parts, tmp_path_factory):
    """Steps 3 and 6, different ones."""
    directory = tmp_path_factory.mktemp("stored") / "checkpoints"
    with CheckpointStore(directory, keep=3) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, _at(parts[1], step), step, "data")
        checkpoints.wait()
    return directory


def _at(state, step):
    scale = state.params["norm.scale"] + np.float32(step)
    return type(state)(state.step, state.params | {"norm.scale": scale}, state.optimizer)


def _largest_file(directory):
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != manifest.NAME]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(directory):
    path = _largest_file(directory)
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(contents)


HARMS = {
    "a flipped bit": (_flip, "has other contents"),
    "a missing file": (lambda d: _largest_file(d).unlink(), "is missing"),
    "no manifest": (lambda d: (d / manifest.NAME).unlink(), "did not finish"),
    "a torn manifest": (lambda d: (d / manifest.NAME).write_text('{"format'), "is damaged"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_the_newest_good_one_is_restored_and_the_bad_one_named(harm, parts, stored, tmp_path):
    directory, notes = tmp_path / "checkpoints", []
    shutil.copytree(stored, directory)
    spoil, message = HARMS[harm]
    spoil(directory / "6")
    abstract, state = parts
    with CheckpointStore(directory, keep=2, note=notes.append) as checkpoints:
        with pytest.raises((manifest.Damaged, FileNotFoundError), match=message):
            checkpoints.restore(abstract, step=6)
        restored = checkpoints.restore(abstract)
        assert restored.position == 3
        wanted = _at(state, 3).params["norm.scale"]
        np.testing.assert_array_equal(restored.state.params["norm.scale"], wanted)
        [note] = notes
        assert str(directory / "6") in note and message in note
        # Reached again, the step is written again; then all is well.
        checkpoints.save(6, _at(state, 6), 6, "data")
        checkpoints.wait()
        assert checkpoints.restore(abstract).position == 6
    manifest.verify(directory / "6")


def test_arrays_that_changed_places_are_found_though_every_file_is_whole(parts, stored, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(stored, directory)
    # As if a writer had bound an array to another's name: files and their checksums agree.
    written = manifest.read(directory / "6")
    arrays = dict(written.arrays)
    scales = sorted(name for name in arrays if name.startswith("params/") and "scale" in name)
    assert arrays[scales[0]].shape != () and len(scales) > 1
    arrays["params/norm.scale"] = manifest.read(directory / "3").arrays["params/norm.scale"]
    (directory / "6" / manifest.NAME).unlink()
    manifest.write(directory / "6", arrays)
    with CheckpointStore(directory, keep=2) as checkpoints:
        with pytest.raises(manifest.Damaged, match=r"params/norm\.scale has other contents"):
            checkpoints.restore(parts[0], step=6)
        assert checkpoints.restore(parts[0]).position == 3


def test_without_any_good_one_nothing_is_restored_and_each_is_named(parts, stored, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(stored, directory)
    for step in (3, 6):
        _flip(directory / str(step))
    message = r"has no good checkpoint: .*/6 is not.*/3 is not"
    with (
        CheckpointStore(directory, keep=2) as checkpoints,
        pytest.raises(ValueError, match=message),
    ):
        checkpoints.restore(parts[0])


def test_retention_counts_good_ones_alone(parts, stored, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(stored, directory)
    _flip(directory / "6")
    with CheckpointStore(directory, keep=2) as checkpoints:
        assert checkpoints.restore(parts[0]).position == 3
        checkpoints.save(9, _at(parts[1], 9), 9, "data")
        checkpoints.wait()
    assert sorted(path.name for path in directory.iterdir()) == ["3", "9"]


def test_a_resume_says_which_checkpoint_it_passed_over(config, tmp_path):
    path, stream = tmp_path / "run", io.StringIO()
    small.train(config, path, stream=io.StringIO())
    _flip(path / "checkpoints" / "8")
    small.train(config, path, resume=True, stream=stream)
    said = stream.getvalue()
    assert "checkpoints/8 is not what was written" in said and "Resuming at step 6" in said
    manifest.verify(path / "checkpoints" / "8")
