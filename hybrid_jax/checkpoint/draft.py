"""A checkpoint being written: what is finished of it, who works on it, and how it gets its name.

Beside DST lies `.DST.draft/` with `conversion.json` (what it is made from, and how), `content/`
(what will be DST), one record a finished unit under `units/`, and one lock and, if it went wrong,
one error a process. Files are all that processes on several machines share. A unit is recorded when
it lies there under its name, forced to the medium; `content` becomes DST as the last step of all.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator

from hybrid_jax.checkpoint import atomic, digests, manifest
from hybrid_jax.checkpoint.formats import protocol
from hybrid_jax.checkpoint.origin import Origin

_CONVERSION = "conversion.json"
_POLL_SECONDS = 0.2
_SAY_SECONDS = 60


class Elsewhere(ValueError):
    """Another process found that the source cannot be converted."""


class Draft:
    """What process `process` of `of` knows of the work; made by `begin`."""

    def __init__(self, dst: pathlib.Path, origin: Origin, process: int, of: int):
        self.dst = dst
        self.work = place(dst)
        self.content = self.work / "content"
        self._origin = origin
        self._process, self._of = process, of
        # Of an earlier start; who wrote them may be about to begin again.
        self._old_errors = self._errors()

    def finished(self, numbers) -> set[int]:
        """Of these units, those that are recorded and whose files have the sizes written."""
        return {number for number in numbers if self._is_there(number)}

    def recorded(self, number: int) -> protocol.Written | None:
        """What is recorded of a unit, if it is and its files have the sizes written."""
        try:
            body = json.loads(self._record(number).read_text(encoding="utf-8"))
            written = protocol.Written(_files(body), digests.from_json(body["arrays"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return written if self._is_there(number) else None

    def forget(self, number: int) -> None:
        """Before a unit is written over: a kill in between must not leave a record of the old."""
        with contextlib.suppress(FileNotFoundError):
            self._record(number).unlink()
            atomic.sync_names(self.work / "units")

    def record(self, number: int, written: protocol.Written) -> None:
        """Say that a unit is written and on the medium."""
        body = {"files": dict(written.files), "arrays": digests.to_json(written.arrays)}
        atomic.write_text(self._record(number), json.dumps(body))

    def check(self) -> None:
        """Raise Elsewhere if another process has found the source to be bad."""
        for name, error in self._errors().items():
            if error["is_input"] and error != self._old_errors.get(name):
                raise Elsewhere(error["message"])

    def finish(
        self, layout: protocol.Layout, note: Callable[[str], None], *, overwrite: bool
    ) -> None:
        """Wait for all units, write what says what is there, and give it the destination's name.

        Raises OSError if another process ends with an error, or the destination was taken.
        """
        self._wait(layout, note)
        files: dict[str, tuple[int, str]] = {}
        arrays: dict[str, digests.Array] = {}
        for unit in layout.units:
            body = json.loads(self._record(unit.number).read_text(encoding="utf-8"))
            files |= _files(body)
            arrays |= digests.from_json(body["arrays"])
        self.complete(layout, protocol.Written(files, arrays), overwrite=overwrite)

    def complete(
        self, layout: protocol.Layout, written: protocol.Written, *, overwrite: bool
    ) -> None:
        """The same when all units are there, and this is what they are."""
        files, arrays = written
        # Of an earlier start that was killed as it wrote the index.
        for left in self.content.glob("*.draft-*"):
            left.unlink()
        layout.finish(self.content, arrays)
        origin = self._origin.digest
        manifest.write(self.content, arrays, files, name=self.dst.name, origin=origin)
        try:
            atomic.check_free(self.dst, overwrite=overwrite)
        except ValueError as error:
            # The source is not to blame, and the work not lost.
            raise FileExistsError(str(error)) from error
        with _alone(self.dst.parent):
            atomic.replace(self.content, self.dst)
            self._remove()

    def _wait(self, layout: protocol.Layout, note: Callable[[str], None]) -> None:
        """Until every unit is there. Raises OSError if another process ends with an error."""
        said = time.monotonic()
        left = [unit.number for unit in layout.units]
        while left := [number for number in left if not self._is_there(number)]:
            self.check()
            for name, error in self._errors().items():
                if error != self._old_errors.get(name):
                    raise OSError(f"{error['message']} Start that process again, and this one.")
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                note(f"{self.dst}: waiting for other processes to write {len(left)} more units.")
            time.sleep(_POLL_SECONDS)

    def _is_there(self, number: int) -> bool:
        try:
            body = json.loads(self._record(number).read_text(encoding="utf-8"))
            return all(
                (self.content / name).stat().st_size == size
                for name, (size, _) in body["files"].items()
            )
        except (OSError, ValueError):
            return False

    def _record(self, number: int) -> pathlib.Path:
        return self.work / "units" / f"{number:06d}.json"

    def _errors(self) -> dict[str, dict]:
        found = {}
        for path in self.work.glob("error-*.json"):
            with contextlib.suppress(OSError, ValueError):
                found[path.name] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _lock_path(self, process: int) -> pathlib.Path:
        return self.work / f"process-{process}-of-{self._of}.lock"

    def _open(self, prepare: Callable[[pathlib.Path], None]) -> None:
        """Make the draft, or find that it is there."""
        new, known = self._aside, self.work / _CONVERSION
        if not known.is_file():
            try:
                (new / "content").mkdir(parents=True)
                (new / "units").mkdir()
                prepare(new / "content")
                text = json.dumps(dict(self._origin.parts), indent=1) + "\n"
                atomic.write_text(new / known.name, text)
                # Another process may have been faster; a name that holds files is not given twice.
                with contextlib.suppress(OSError):
                    os.rename(new, self.work)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        try:
            there = Origin(json.loads(known.read_text(encoding="utf-8")))
            different = self._origin.differences(there)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.work} is no unfinished checkpoint ({error}), and one must lie there. "
                "Remove it, or choose another destination."
            ) from error
        if different:
            raise ValueError(
                f"{self.work} holds an unfinished checkpoint with other contents: not the same "
                f"{' and '.join(different)}. Go on as it was begun, or remove it: "
                f"rm -r {self.work}"
            )
        bad = [error for error in self._errors().values() if error["is_input"]]
        if bad:
            raise ValueError(
                f"{self.work} is what is left of one that failed: {bad[0]['message']} "
                f"Remove it: rm -r {self.work}"
            )

    def _lock(self, process: int):
        """The open lock of a process. BlockingIOError if somebody holds it."""
        file = self._lock_path(process).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(
                f"{self.dst} is being written by {holder}. Wait until it ends, or stop it."
            ) from error
        except OSError:
            # A file system without locks: better no protection than no checkpoint.
            pass
        return file

    def _check_others(self) -> None:
        """ValueError if somebody works here who counts the processes otherwise."""
        for path in self.work.glob("process-*.lock"):
            if path.name.endswith(f"-of-{self._of}.lock"):
                continue
            with path.open("a+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(
                        f"{self.work} has a process at work that knows of another number of "
                        f"processes than {self._of}: {path.name}. Give all the same number."
                    ) from error
                except OSError:
                    pass

    def _is_last(self) -> bool:
        """Whether no process works here any more."""
        for attempt in range(5):
            with contextlib.ExitStack() as held:
                try:
                    for process in range(self._of):
                        held.enter_context(self._lock(process))
                    return True
                except OSError:
                    # Two that look at once see each other.
                    time.sleep(0.05 * (1 + self._process % 7) * (1 + attempt))
        return False

    def _leave(self, error: BaseException, note: Callable[[str], None]) -> None:
        """Tell the others of an error, and remove what nobody will go on with."""
        is_input = isinstance(error, ValueError)
        message = f"process {self._process} of {self._of}: {error}"
        body = {"is_input": is_input, "message": message, "time": time.time()}
        if self._of > 1 and not isinstance(error, Elsewhere):
            with contextlib.suppress(OSError):
                atomic.write_text(self.work / f"error-{self._process}.json", json.dumps(body))
        count = 0 if is_input else len(list((self.work / "units").glob("*.json")))
        if count:
            note(
                f"{count} units of {self.dst} are finished and kept in {self.work}: the same "
                "again goes on with them."
            )
        elif (is_input or self._of == 1) and self._is_last():
            # Libraries may have threads that write a moment longer.
            atomic.remove(self.work)

    @property
    def _aside(self) -> pathlib.Path:
        """What lies here has not begun, or is over."""
        return self.work.with_name(f"{self.work.name}-{self._process}")

    def _remove_if_over(self) -> None:
        """What is left where only the last step of all was cut off, or the first."""
        if not (self.work.is_dir() or self._aside.is_dir()):
            return
        with _alone(self.dst.parent):
            shutil.rmtree(self._aside, ignore_errors=True)
            if (self.work / _CONVERSION).is_file() and not self.content.is_dir():
                self._remove()

    def _remove(self) -> None:
        """Killed in the midst of it, it is no draft any more."""
        with contextlib.suppress(OSError):
            os.rename(self.work, self._aside)
        shutil.rmtree(self._aside, ignore_errors=True)


def _files(body: dict) -> dict[str, tuple[int, str]]:
    return {name: (size, digest) for name, (size, digest) in body["files"].items()}


def place(dst: pathlib.Path) -> pathlib.Path:
    """Where the work on a destination lies."""
    return dst.with_name(f".{dst.name}.draft")


@contextlib.contextmanager
def begin(
    dst,
    origin: Origin,
    prepare: Callable[[pathlib.Path], None],
    note: Callable[[str], None],
    *,
    process: int,
    of: int,
    overwrite: bool,
) -> Iterator[Draft | None]:
    """Begin a checkpoint, or go on with it, as one of `of` processes; None if it is done already.

    `prepare` writes the small files into a new `content`. If the block ends with a ValueError, the
    source is bad and nothing stays; with anything else, what is finished stays.

    Raises ValueError if the destination is occupied, or by the work on another one;
    BlockingIOError if the same process of the same one is at work.
    """
    dst = pathlib.Path(os.path.abspath(dst))
    Draft(dst, origin, process, of)._remove_if_over()
    if (of > 1 or not overwrite) and _is_done(dst, origin):
        yield None
        return
    atomic.check_free(dst, overwrite=overwrite)
    made = atomic.make(dst.parent)
    try:
        draft = Draft(dst, origin, process, of)
        with _alone(dst.parent):
            draft._open(prepare)
        draft._check_others()
        lock = draft._lock(process)
    except BaseException:
        atomic.unmake(made)
        raise
    try:
        with lock:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            (draft.work / f"error-{process}.json").unlink(missing_ok=True)
            yield draft
    except BaseException as error:
        draft._leave(error, note)
        atomic.unmake(made)
        raise


@contextlib.contextmanager
def _alone(directory: pathlib.Path):
    """Meanwhile nobody else begins or ends a checkpoint in this directory.

    Two that call themselves the same process would mix up what they prepare. Without locks, on some
    network file systems, they may.
    """
    fd = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _is_done(dst: pathlib.Path, origin: Origin) -> bool:
    """Whether the destination is this very conversion, by its manifest and the sizes of files."""
    try:
        found = manifest.read(dst)
        return (
            origin.digest is not None
            and found.origin == origin.digest
            and all((dst / name).stat().st_size == size for name, (size, _) in found.files.items())
        )
    except (OSError, manifest.Damaged):
        return False
