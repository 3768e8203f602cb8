"""The whole training state on disk, written while training goes on; the only file that calls Orbax.

RUN/checkpoints/<step>/ holds two Orbax trees, `params` (by dotted name) and `optimizer`, and as its
metadata the position in the data. A directory appears by one rename, so what is listed is whole.
With several processes each writes and reads the parts of its devices; all take part in every call.
"""

import contextlib
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybrid_jax.training.state import TrainState


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    state: TrainState
    position: int
    """Batches of data taken."""
    fingerprint: str
    """Identifies the data the position belongs to."""


class CheckpointStore:
    """Checkpoints of one run, oldest removed first; leaving its context waits for open writes."""

    def __init__(self, directory, keep: int | None):
        """The run's own store: keeps the `keep` newest and clears what a killed run left half done.

        `keep=None` only reads and touches nothing, safe while another process trains there.
        """
        policies = ocp.training.save_decision_policies
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(directory).absolute(),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )

    @classmethod
    def reading(cls, directory) -> "CheckpointStore":
        """A store to restore from. Raises ValueError if `directory` does not exist."""
        if not pathlib.Path(directory).is_dir():
            raise ValueError(f"{directory} does not exist: the run has stored no checkpoint yet.")
        return cls(directory, keep=None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, position: int, fingerprint: str) -> None:
        """Begin to write; waits for the write before only. A step that is there stays as it is."""
        if step == self.latest_step:
            return
        with self._explained():
            self._checkpointer.save_checkpointables_async(
                step,
                {"params": state.params, "optimizer": state.optimizer},
                custom_metadata={"position": position, "fingerprint": fingerprint},
            )

    def wait(self) -> None:
        """Return when everything is on disk. Raises OSError if something could not be written."""
        with self._explained():
            self._checkpointer.wait()

    @contextlib.contextmanager
    def _explained(self):
        """What goes wrong while writing, as one sentence; a full disk is a ValueError in Orbax."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise OSError(
                f"A checkpoint could not be written to {self._checkpointer.directory} ({error}). "
                "Checkpoints before it are whole: make room or permit writing, then use --resume."
            ) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored:
        """The state at `step` (None: the newest); ValueError if it does not fit `abstract`.

        Arrays go where `abstract` says, else to the first device, wherever they were when stored.
        """
        step = self._pick(step)
        trees = self._load(step, {"params": abstract.params, "optimizer": abstract.optimizer})
        progress = self._checkpointer.checkpointables_metadata(step).custom_metadata
        # Bound like the rest: a resumed run then compiles the very program the first one did, and
        # finds it in JAX's compilation cache.
        count = jax.make_array_from_callback(
            (), _placed(abstract.step).sharding, lambda _: np.array(step, np.int32)
        )
        state = TrainState(count, trees["params"], trees["optimizer"])
        return Restored(state, progress["position"], progress["fingerprint"])

    def restore_params(self, abstract: dict, step: int | None = None) -> dict[str, jax.Array]:
        """The parameters alone, by name."""
        return self._load(self._pick(step), {"params": abstract})["params"]

    def _pick(self, step: int | None) -> int:
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        if step is None and steps:
            return steps[-1]
        if step is None or step not in steps:
            raise ValueError(
                f"{self._checkpointer.directory} has no checkpoint"
                f"{'' if step is None else f' of step {step}'}; it has {steps or 'none at all'}."
            )
        return step

    def _load(self, step: int, abstract: dict) -> dict:
        placed = jax.tree.map(_placed, abstract)
        try:
            return self._checkpointer.load_checkpointables(step, placed)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"The checkpoint {self._checkpointer.directory / str(step)} cannot be read as this "
                f"model's: {error}. Remove it to fall back on the one before, or use the "
                "configuration it was written with."
            ) from error


def _placed(leaf) -> jax.ShapeDtypeStruct:
    """`leaf` with a place to go to: its own, or the first device."""
    if leaf.sharding is not None:
        return leaf
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)
