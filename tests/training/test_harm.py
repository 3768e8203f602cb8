"""Random harm to files of checkpoints of random weights: all of it is found, none is restored."""

import dataclasses
import pathlib
import random

import jax
import numpy as np
import pytest

from hybrid_jax.checkpoint import digests, manifest
from hybrid_jax.training.checkpoints import CheckpointStore
from tests.training import dying

HARMS = ("flip", "truncate", "empty", "remove", "swap", "rename", "add")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Steps 1 and 2."""
    directory = tmp_path_factory.mktemp("stored")
    with CheckpointStore(directory, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, dying.state(step), step, "data")
            checkpoints.wait()
    return directory


@pytest.fixture(scope="module")
def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dying.state(1))


def kind_of(path: pathlib.Path) -> str:
    """So that the few large files do not hide the many small ones, each kind is drawn alike."""
    if path.name == manifest.NAME:
        return "manifest"
    if path.stat().st_size == 0:
        return "empty"
    return "data" if path.parent.name == "d" else "metadata"


def flipped(contents: bytes, chosen: random.Random) -> bytes:
    """With one bit changed."""
    after, bit = bytearray(contents), chosen.randrange(8 * len(contents))
    after[bit // 8] ^= 1 << bit % 8
    return bytes(after)


@dataclasses.dataclass
class Harm:
    """What was done to one file of a directory, and how to undo it."""

    what: str
    kind: str
    path: pathlib.Path
    before: dict[pathlib.Path, bytes]
    made: list[pathlib.Path]

    def undo(self) -> None:
        for path in self.made:
            path.unlink()
        for path, contents in self.before.items():
            path.write_bytes(contents)


def do(directory: pathlib.Path, what: str, chosen: random.Random) -> Harm:
    """Harm a random file in the given way."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    if what in ("flip", "truncate", "empty"):
        files = [path for path in files if path.stat().st_size]
    kind = chosen.choice(sorted({kind_of(path) for path in files}))
    path = chosen.choice([path for path in files if kind_of(path) == kind])
    contents = path.read_bytes()
    harm = Harm(what, kind, path, {path: contents}, [])
    match what:
        case "flip":
            path.write_bytes(flipped(contents, chosen))
        case "truncate":
            path.write_bytes(contents[: chosen.randrange(len(contents))])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
        case "swap":
            other = chosen.choice([each for each in files if each.read_bytes() != contents])
            harm.before[other] = other.read_bytes()
            path.write_bytes(harm.before[other])
            other.write_bytes(contents)
        case "rename":
            harm.made.append(path.rename(path.with_name(f"{chosen.getrandbits(64):x}")))
        case "add":
            extra = chosen.choice([path.parent, directory]) / f"{chosen.getrandbits(64):x}"
            extra.write_bytes(chosen.choice([b"", contents]))
            harm.made.append(extra)
    return harm


def find_all(stored, abstract, count: int, restored_every: int) -> dict[tuple[str, str], int]:
    """Harm step 2 `count` times; how often in which way. Some of the times it is restored, too."""
    chosen, done = random.Random(7), {}
    for number in range(count):
        harm = do(stored / "2", HARMS[number % len(HARMS)], chosen)
        try:
            # Without its manifest it counts as unfinished.
            with pytest.raises((manifest.Damaged, FileNotFoundError)):
                manifest.verify(stored / "2")
                pytest.fail(f"not found: {harm.what} of {harm.path}")
            if number % restored_every == 0:
                with CheckpointStore.reading(stored) as checkpoints:
                    assert checkpoints.restore(abstract).position == 1, harm
        finally:
            harm.undo()
        done[harm.what, harm.kind] = done.get((harm.what, harm.kind), 0) + 1
    manifest.verify(stored / "2")
    return done


def test_any_harm_to_any_file_is_found(stored, abstract):
    done = find_all(stored, abstract, 140, restored_every=20)
    assert {what for what, _ in done} == set(HARMS)
    assert {kind for _, kind in done} == {"data", "metadata", "manifest", "empty"}


@pytest.mark.nightly
def test_a_thousand_harms_are_found(stored, abstract):
    done = find_all(stored, abstract, 1000 * len(HARMS), restored_every=71)
    # 7 ways x 3 or 4 kinds of file.
    assert len(done) == 25 and min(done.values()) > 150, done


@pytest.fixture
def then_write(monkeypatch):
    """Lets a file change as soon as it has been verified: then_write(path, its new bytes)."""
    verify = manifest.verify

    def install(path: pathlib.Path, after: bytes) -> None:
        def verify_and_write(*arguments, **options):
            whole = verify(*arguments, **options)
            path.write_bytes(after)
            return whole

        monkeypatch.setattr(manifest, "verify", verify_and_write)

    return install


def test_files_are_read_again_where_arrays_could_not_be_compared(
    stored, abstract, then_write, monkeypatch
):
    """As on a mesh of other processes that cuts them smaller than they were."""
    monkeypatch.setattr(digests, "check", lambda *_: ["a.scale"])
    with CheckpointStore.reading(stored) as checkpoints:
        assert checkpoints.restore(abstract, step=2).position == 2
        path = next(p for p in (stored / "2").rglob("d/*") if p.stat().st_size > 10_000)
        before = path.read_bytes()
        then_write(path, flipped(before, random.Random(1)))
        try:
            with pytest.raises(manifest.Damaged, match="has other contents"):
                checkpoints.restore(abstract, step=2)
        finally:
            path.write_bytes(before)


def flip_after_verifying(stored, abstract, then_write, count: int) -> tuple[int, int]:
    """(found, harmless): bits of data that flip between the verification and the reading."""
    chosen, found = random.Random(3), 0
    data = sorted(p for p in (stored / "2").rglob("d/*") if p.stat().st_size > 10_000)
    wanted = jax.tree.map(np.asarray, dying.state(2))
    assert len(data) == 2
    for _ in range(count):
        path = chosen.choice(data)
        before = path.read_bytes()
        then_write(path, flipped(before, chosen))
        try:
            with CheckpointStore.reading(stored) as checkpoints:
                restored = checkpoints.restore(abstract, step=2)
        except manifest.Damaged:
            found += 1
        else:
            # Of a byte nobody reads.
            got = jax.tree.map(np.asarray, restored.state)
            jax.tree.map(np.testing.assert_array_equal, got.params, wanted.params)
            jax.tree.map(np.testing.assert_array_equal, got.optimizer, wanted.optimizer)
        finally:
            path.write_bytes(before)
    return found, count - found


def test_what_cannot_be_read_any_more_is_damaged_not_another_configuration(
    stored, abstract, then_write
):
    path = next(p for p in (stored / "2").rglob("d/*") if p.stat().st_size > 10_000)
    before = path.read_bytes()
    then_write(path, b"")
    try:
        with CheckpointStore.reading(stored) as checkpoints:
            assert checkpoints.restore(abstract).position == 1
    finally:
        path.write_bytes(before)


def test_bits_that_flip_after_the_verification_are_found(stored, abstract, then_write):
    found, harmless = flip_after_verifying(stored, abstract, then_write, 8)
    assert found >= 7, (found, harmless)


@pytest.mark.nightly
def test_two_hundred_bits_that_flip_after_the_verification(stored, abstract, then_write):
    found, harmless = flip_after_verifying(stored, abstract, then_write, 200)
    assert found >= 190, (found, harmless)
