"""Checkpoints in their turn: one that cannot be written is said, and training goes on."""

from collections.abc import Callable

from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.state import TrainState
from sharding import processes


class Saver:
    """Stores the states of one run; all processes take the same way, whichever of them fails."""

    def __init__(self, store: CheckpointStore, fingerprint: str, note: Callable[[str], None]):
        self._store = store
        self._fingerprint = fingerprint
        self._note = note
        self._written: int | None = store.latest_step
        """The newest step that all processes know to be on disk."""
        self._begun: int | None = None
        """What is being written, or was and has not been agreed on."""
        self._problem: Exception | None = None
        """Why that failed, as far as this process knows."""
        self._untold: int | None = None

    def save(self, step: int, state: TrainState, position: dict) -> None:
        """Begin to store a state; waits for the write before it.

        Does nothing for a step that is stored, is being stored, or has just failed to be.
        """
        if step == self._begun:
            return
        self.settle()
        if step == self._written:
            return
        self._begun = step
        try:
            processes.all_pass(lambda: self._store.save(step, state, position, self._fingerprint))
        except (OSError, ValueError) as error:
            self._fail(error)

    def poll(self) -> int | None:
        """Without waiting: the step of a write that was found to have failed since the last call.

        Of what failed in another process this one learns when it settles.
        """
        if self._begun is not None and self._problem is None and not self._store.is_writing:
            try:
                self._store.wait()
            except OSError as error:
                self._fail(error)
        untold, self._untold = self._untold, None
        return untold

    def settle(self, is_last: bool = False) -> Exception | None:
        """Wait for the write at hand; with all processes, the reason if it failed in any.

        After the last one nothing goes on, and nothing is said: the caller has the reason.
        """
        if self._begun is None:
            return None
        try:
            processes.all_pass(self._result)
        except (OSError, ValueError) as error:
            if self._problem is None and not is_last:
                self._fail(error)
            self._begun = self._problem = None
            return error
        self._written, self._begun = self._begun, None
        return None

    def finish(self) -> None:
        """Wait until everything is on disk. Raises OSError if the newest state is not."""
        if (error := self.settle(is_last=True)) is not None:
            raise OSError(f"The newest state is lost. {error}") from error

    def _result(self) -> None:
        if self._problem is not None:
            raise self._problem
        self._store.wait()

    def _fail(self, error: Exception) -> None:
        self._problem, self._untold = error, self._begun
        self._note(f"{error} Training goes on; the next checkpoint is tried in its turn.")
