"""The whole training state on disk, written while training goes on; the only file that calls Orbax.

RUN/checkpoints/<step>/ holds two Orbax trees, `params` (by dotted name) and `optimizer`, as its
metadata the position in the data, and a manifest of checksums (`checkpoint.manifest`). Orbax makes
the directory appear by one rename; the manifest comes last, so a directory without one is
unfinished and one that its manifest does not fit is damaged: neither is ever restored, nor counted
as one to keep. With several processes each writes and reads the parts of its devices; all take part
in every call.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybrid_jax.checkpoint import manifest
from hybrid_jax.training.state import TrainState
from sharding import processes

# Until what one process wrote is seen by the first on a network file system.
_SECONDS_TO_APPEAR = 90


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    state: TrainState
    position: int
    """Batches of data taken."""
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
        self._bad: set[int] = set()
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

    def save(self, step: int, state: TrainState, position: int, fingerprint: str) -> None:
        """Begin to write; waits for the write before only. A step that is there stays as it is.

        The state is hashed and copied before this returns: an update may then take its memory.
        """
        self.wait()
        if step == self._latest:
            return
        with self._explained():
            arrays = manifest.describe(_named(state))
            _leave_part(self._directory, step, arrays)
            response = ocp.save_checkpointables_async(
                self._path(step),
                {"params": state.params, "optimizer": state.optimizer},
                # An unfinished or damaged one of the same step.
                overwrite=True,
                custom_metadata={"position": position, "fingerprint": fingerprint},
            )
        self._writing = self._finisher.submit(self._finish, step, response, arrays)

    def wait(self) -> None:
        """Return when everything is on disk. Raises OSError if something could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._explained():
                self._latest = writing.result()

    def _finish(self, step: int, response, arrays) -> int:
        response.result()
        if processes.is_first():
            manifest.write(self._path(step), _all_parts(self._directory, step, arrays))
            self._bad.discard(step)
            self._retain()
        return step

    def _retain(self) -> None:
        """Remove what is older than the newest `keep` whole ones; never one of those."""
        whole, unfinished = _steps(self._directory)
        good = [step for step in whole if step not in self._bad]
        if self._keep is None or not good:
            return
        bad = [step for step in (*unfinished, *self._bad) if step < good[-1]]
        for step in (*good[: -self._keep], *bad):
            _remove(self._path(step))
            self._bad.discard(step)

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

        With `before` the newest good one of an earlier step than that.
        Every file is read and held against its checksum before, every array after. A newest one
        that is damaged is named and passed over; with `step` that is an error, `manifest.Damaged`.
        Arrays go where `abstract` says, else to the first device, wherever they were when stored.
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
                self._verify(each)
                trees = self._load(each, abstract)
                processes.all_pass(functools.partial(self._check, each, trees))
            except (manifest.Damaged, FileNotFoundError) as error:
                if step is not None:
                    raise
                problems.append(str(error))
                self._bad.add(each)
                self._note(f"{error} Trying the checkpoint before it.")
                continue
            # A later one that is bad is no longer the latest, and is written again in its turn.
            self._latest = max(set(whole) - self._bad)
            return each, trees
        raise ValueError(f"{self._directory} has no good checkpoint: {' '.join(problems)}")

    def _verify(self, step: int) -> None:
        """Read all files once, in the first process. Raises Damaged or FileNotFoundError in all."""

        def look() -> str:
            try:
                manifest.verify(self._path(step))
            except (manifest.Damaged, FileNotFoundError) as error:
                return f"{type(error).__name__}:{error}"
            return ""

        kind, _, problem = processes.from_first(look).partition(":")
        if problem:
            raise {"Damaged": manifest.Damaged}.get(kind, FileNotFoundError)(problem)

    def _check(self, step: int, trees: dict) -> None:
        written = manifest.read(self._path(step))
        found = _by_name(trees)
        prefixes = tuple(f"{name}/" for name in trees)
        asked = {k: v for k, v in written.arrays.items() if k.startswith(prefixes)}
        manifest.check_arrays(dataclasses.replace(written, arrays=asked), found)

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
    """Remove what a killed run left: drafts, what was being removed, parts of manifests."""
    for pattern in ("*.orbax-checkpoint-tmp*", ".gone-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(".part-*"):
        path.unlink(missing_ok=True)


def _remove(path: pathlib.Path) -> None:
    """Out of sight by one rename, then away: a kill in between leaves nothing half there."""
    gone = path.with_name(f".gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _named(state: TrainState) -> dict[str, jax.Array]:
    return _by_name({"params": state.params, "optimizer": state.optimizer})


def _by_name(trees: dict) -> dict[str, jax.Array]:
    """Every array of the trees under its path, e.g. params/norm.scale."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _part(directory: pathlib.Path, step: int, process: int) -> pathlib.Path:
    return directory / f".part-{step}-{process}"


def _leave_part(directory: pathlib.Path, step: int, arrays) -> None:
    """What this process knows of the arrays, for the first process to collect."""
    if not processes.is_first():
        text = json.dumps(manifest.to_json(arrays))
        _part(directory, step, jax.process_index()).write_text(text, encoding="utf-8")


def _all_parts(directory: pathlib.Path, step: int, own) -> dict[str, manifest.Array]:
    """The arrays of all processes. Raises OSError if one's part does not appear."""
    parts = [own]
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    for process in range(1, jax.process_count()):
        path = _part(directory, step, process)
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError):
                parts.append(manifest.from_json(json.loads(path.read_text(encoding="utf-8"))))
                break
            if time.monotonic() > deadline:
                raise OSError(f"process {process} left no {path.name} beside the checkpoint")
            time.sleep(0.1)
    merged = manifest.merge(parts)
    for process in range(1, jax.process_count()):
        _part(directory, step, process).unlink(missing_ok=True)
    return merged


def _placed(leaf) -> jax.ShapeDtypeStruct:
    """`leaf` with a place to go to: its own, or the first device."""
    if leaf.sharding is not None:
        return leaf
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)
