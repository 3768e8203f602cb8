"""Which saves are begun, when a failed one is told, and when that is an error; no disk needed."""

import pytest

from hybrid_jax.training.saving import Saver


class Store:
    """A `CheckpointStore` whose writes end when and how a test says."""

    latest_step = None

    def __init__(self):
        self.begun, self.is_writing, self.problem = [], False, None

    def save(self, step, state, position, fingerprint):
        assert not self.is_writing
        self.begun.append(step)
        self.is_writing = True

    def end(self, problem=None):
        self.is_writing, self.problem = False, problem

    def wait(self):
        self.is_writing = False
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem


@pytest.fixture
def parts():
    store, notes = Store(), []
    return store, Saver(store, "data", notes.append), notes


def test_a_failure_is_told_in_the_step_it_is_known_and_once(parts):
    store, saver, notes = parts
    saver.save(3, None, {})
    assert saver.poll() is None and notes == []
    store.end(OSError("no space"))
    assert saver.poll() == 3 and saver.poll() is None
    assert len(notes) == 1 and "no space Training goes on" in notes[0]
    # The same step is not tried again, the next one is.
    saver.save(3, None, {})
    saver.save(6, None, {})
    assert store.begun == [3, 6] and len(notes) == 1
    store.end()
    saver.finish()


def test_a_failure_that_only_the_next_save_meets_is_told_with_the_next_step(parts):
    store, saver, notes = parts
    saver.save(3, None, {})
    store.problem = OSError("no space")
    saver.save(6, None, {})
    assert store.begun == [3, 6] and saver.poll() == 3 and len(notes) == 1


def test_the_newest_state_must_be_stored_and_no_older_one(parts):
    store, saver, notes = parts
    saver.save(3, None, {})
    store.end(OSError("no space"))
    saver.save(6, None, {})
    store.end()
    saver.finish()
    # A stop right after a save stores nothing twice.
    saver.save(6, None, {})
    assert store.begun == [3, 6]
    saver.save(8, None, {})
    store.end(OSError("no space"))
    saver.save(8, None, {})
    # Said once, by the error.
    with pytest.raises(OSError, match=r"newest state is lost\. no space"):
        saver.finish()
    assert len(notes) == 1
