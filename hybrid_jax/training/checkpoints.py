"""The whole training state on disk, written while training goes on; the only file that calls Orbax.

RUN/checkpoints/<step>/ holds two Orbax trees, `params` (by dotted name) and `optimizer`, as its
metadata the position in the data, and a manifest of checksums (`checkpoint.manifest`). Orbax makes
the directory appear by one rename; the manifest comes last, so a directory without one is
unfinished and one that its manifest does not fit is damaged: neither is ever restored, nor counted
as one to keep. With several processes each writes and reads the parts of its devices, and they
share the hashing of files; all take part in every call, and what one finds damaged is so for all.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybrid_jax.checkpoint import digests, faults, manifest
from hybrid_jax.training import shares
from hybrid_jax.training.state import TrainState
from sharding import processes

T = TypeVar("T")


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    state: TrainState
    position: dict
    """Where the data goes on; valid JSON."""
    fingerprint: str
    """Identifies the data the position belongs to."""


class CheckpointStore:
    """Checkpoints of one run, oldest removed first; leaving its context waits for open writes."""

    def __init__(
        self, directory, keep: int | None, note: Callable[[str], None] = lambda text: None
    ):
        """The run's own store: keeps the `keep` newest and clears what a killed run left half done.

        `keep=None` only reads and touches nothing, safe while another process trains there. `note`
        is told of checkpoints that are passed over.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._note = note
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._writing: concurrent.futures.Future | None = None
        # Steps that are damaged, or of a course that was left by restoring an older step.
        self._bad: set[int] = set()
        self._begun = 0
        if keep is not None and processes.is_first():
            _clear(self._directory)
        self._latest = max(self._decided()[0], default=None)

    @classmethod
    def reading(cls, directory) -> "CheckpointStore":
        """A store to restore from. Raises ValueError if `directory` does not exist."""
        if not pathlib.Path(directory).is_dir():
            raise ValueError(f"{directory} does not exist: the run has stored no checkpoint yet.")
        return cls(directory, keep=None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._finisher.shutdown()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        return self._latest

    @property
    def latest_path(self) -> pathlib.Path | None:
        """Where that is."""
        return None if self._latest is None else self._path(self._latest)

    @property
    def is_writing(self) -> bool:
        """Whether a write has begun and not ended; `wait` returns at once if not."""
        return self._writing is not None and not self._writing.done()

    def has_before(self, step: int) -> bool:
        """Whether there is a checkpoint older than `step`; the same answer in all processes."""
        return any(each < step for each in self._decided()[0] if each not in self._bad)

    def save(self, step: int, state: TrainState, position: dict, fingerprint: str) -> None:
        """Begin to write; waits for the write before only. A step that is there stays as it is.

        The state is in host memory before this returns: an update may then take its buffers.
        """
        self.wait()
        if step == self._latest:
            return
        if processes.is_first():
            # What a save that failed has left may be the very room that this one lacks.
            _remove_drafts(self._directory)
        self._begun += 1
        with self._explained():
            faults.reach("begin")
            held = digests.hold(_named(state))
            context = ocp.Context()
            # Or on GPUs Orbax would copy again, to memory of another kind.
            context.array_options.saving.enable_pinned_host_transfer = False
            with context:
                response = ocp.save_checkpointables_async(
                    self._path(step),
                    {"params": state.params, "optimizer": state.optimizer},
                    # An unfinished or damaged one of the same step.
                    overwrite=True,
                    custom_metadata={"position": position, "fingerprint": fingerprint},
                )
        self._writing = self._finisher.submit(self._finish, step, response, held, self._begun)

    def wait(self) -> None:
        """Return when everything is on disk. Raises OSError if something could not be written.

        This process's part of it: only the first one writes the manifest, by which it counts.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._explained():
                self._latest = writing.result()

    def _finish(self, step: int, response, held, number: int) -> int:
        """Until all is on disk; beside the training."""
        path = self._path(step)
        try:
            faults.reach("arrays")
            arrays = digests.describe(held)
            del held
        finally:
            # Whatever happens here, Orbax writes on, and the next save must find it done.
            response.result()
        faults.reach("written")
        self._bad.discard(step)
        if jax.process_count() > 1:
            files = manifest.hash_files(path, jax.process_index(), jax.process_count())
            if not processes.is_first():
                shares.leave(self._directory, number, arrays, files)
                return step
            manifest.write(path, *shares.collect(self._directory, number, arrays, files))
        else:
            manifest.write(path, arrays)
        self._retain(step)
        return step

    def _retain(self, newest: int) -> None:
        """Remove all but `newest`, which was just written, and the good ones before it to keep.

        What cannot be removed is noted; the next save tries again.
        """
        if self._keep is None:
            return
        whole, unfinished = _steps(self._directory)
        good = [step for step in whole if step not in self._bad and step <= newest]
        for path in self._directory.glob(".gone-*"):
            shutil.rmtree(path, ignore_errors=True)
        for step in sorted({*whole, *unfinished} - {*good[-self._keep :], newest}):
            try:
                _remove(self._path(step))
                self._bad.discard(step)
            except OSError as error:
                self._note(f"The old checkpoint {self._path(step)} could not be removed: {error}.")

    @contextlib.contextmanager
    def _explained(self):
        """What goes wrong while writing, as one sentence; a full disk is a ValueError in Orbax."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise OSError(
                f"A checkpoint could not be written to {self._directory} ({error}). "
                "Checkpoints before it are whole: make room or permit writing, then use --resume."
            ) from error

    def restore(
        self, abstract: TrainState, step: int | None = None, before: int | None = None
    ) -> Restored:
        """The state at `step` (None: the newest good one); ValueError if it is not like `abstract`.

        With `before` the newest good one of an earlier step than that. Every file is read and held
        against its checksum before, every array after. A newest one that is damaged is named and
        passed over; with `step` that is an error, `manifest.Damaged`. Steps after the one restored
        count as left: the next save removes them. Arrays go where `abstract` says, else to the
        first device, wherever they were when stored.
        """
        wanted = {"params": abstract.params, "optimizer": abstract.optimizer}
        step, trees = self._first_good(step, wanted, before)
        progress = ocp.checkpointables_metadata(self._path(step)).custom_metadata
        # Bound like the rest: a resumed run then compiles the very program the first one did, and
        # finds it in JAX's compilation cache.
        count = jax.make_array_from_callback(
            (), _placed(abstract.step).sharding, lambda _: np.array(step, np.int32)
        )
        state = TrainState(count, trees["params"], trees["optimizer"])
        return Restored(state, progress["position"], progress["fingerprint"])

    def restore_params(self, abstract: dict, step: int | None = None) -> dict[str, jax.Array]:
        """The parameters alone, by name; verified as by `restore`."""
        return self._first_good(step, {"params": abstract})[1]["params"]

    def _first_good(
        self, step: int | None, abstract: dict, before: int | None = None
    ) -> tuple[int, dict]:
        """(its step, its trees) of the checkpoint asked for, or the newest that is as written."""
        self.wait()
        whole, unfinished = self._decided()
        if not whole + unfinished or step not in [None, *whole, *unfinished]:
            raise ValueError(
                f"{self._directory} has no checkpoint"
                f"{'' if step is None else f' of step {step}'}; it has {whole or 'none at all'}."
            )
        tried = sorted(whole + unfinished, reverse=True) if step is None else [step]
        if before is not None:
            tried = [each for each in tried if each < before]
        problems = []
        for each in tried:
            try:
                trees = self._read(each, abstract)
            except manifest.Damaged as error:
                if step is not None:
                    raise
                problems.append(str(error))
                self._bad.add(each)
                self._note(f"{error} Trying the checkpoint before it.")
                continue
            self._bad.update(later for later in whole if later > each)
            self._latest = each
            return each, trees
        raise ValueError(f"{self._directory} has no good checkpoint: {' '.join(problems)}")

    def _read(self, step: int, abstract: dict) -> dict:
        """The trees of one checkpoint, verified. Raises Damaged in all processes or none."""
        path = self._path(step)
        share = {"name": path.name, "number": jax.process_index(), "of": jax.process_count()}
        written = _agree(lambda: manifest.verify(path, **share))
        asked = tuple(f"{name}/" for name in abstract)
        arrays = {name: a for name, a in written.arrays.items() if name.startswith(asked)}

        def load() -> tuple[dict, list[str]]:
            trees = self._load(step, abstract)
            return trees, digests.check(arrays, _by_name(trees))

        trees, uncompared = _agree(load)
        if any(processes.gather(" ".join(uncompared))):
            # Files that are whole before and after were whole in between.
            _agree(lambda: manifest.verify(path, **share))
        return trees

    def _decided(self) -> tuple[list[int], list[int]]:
        """`_steps` as the first process sees them: all must try the same ones."""
        whole, unfinished = json.loads(
            processes.from_first(lambda: json.dumps(_steps(self._directory)))
        )
        return whole, unfinished

    def _load(self, step: int, abstract: dict) -> dict:
        placed = jax.tree.map(_placed, abstract)
        try:
            return ocp.load_checkpointables(self._path(step), placed)
        except (ValueError, KeyError, OSError) as error:
            # Not if it was damaged since it was verified.
            manifest.verify(self._path(step))
            raise ValueError(
                f"The checkpoint {self._path(step)} cannot be read as this model's: {error}. Use "
                "the configuration it was written with, or remove it to take the one before."
            ) from error

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)


def _steps(directory: pathlib.Path) -> tuple[list[int], list[int]]:
    """(steps with a manifest, steps without), ascending."""
    found = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit() and p.is_dir())
    whole = [step for step in found if (directory / str(step) / manifest.NAME).is_file()]
    return whole, [step for step in found if step not in whole]


def _clear(directory: pathlib.Path) -> None:
    """Remove what a killed run left: drafts, and what was being removed."""
    _remove_drafts(directory)
    for path in directory.glob(f"[0-9]*/{manifest.NAME}.draft-*"):
        path.unlink(missing_ok=True)
    shares.clear(directory)


def _remove_drafts(directory: pathlib.Path) -> None:
    """Remove what does not count and no write is filling."""
    for pattern in ("*.orbax-checkpoint-tmp*", ".gone-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: pathlib.Path) -> None:
    """Out of sight by one rename, then away: a kill in between leaves nothing half there."""
    gone = path.with_name(f".gone-{path.name}")
    faults.reach("retention")
    path.rename(gone)
    faults.reach("deletion")
    shutil.rmtree(gone)


def _agree(check: Callable[[], T]) -> T:
    """What `check` gives, if it finds no damage in any process; else Damaged in all of them."""
    problem, result = "", None
    try:
        result = check()
    except (manifest.Damaged, FileNotFoundError) as error:
        problem = str(error)
    if said := [text for text in processes.gather(problem) if text]:
        raise manifest.Damaged(said[0])
    return result  # type: ignore[return-value]


def _named(state: TrainState) -> dict[str, jax.Array]:
    return _by_name({"params": state.params, "optimizer": state.optimizer})


def _by_name(trees: dict) -> dict[str, jax.Array]:
    """Every array of the trees under its path, e.g. params/norm.scale."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _placed(leaf) -> jax.ShapeDtypeStruct:
    """`leaf` with a place to go to: its own, or the first device."""
    if leaf.sharding is not None:
        return leaf
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)
