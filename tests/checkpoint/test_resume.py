"""A conversion that ended early goes on, and one that several processes share is the same one."""

import contextlib
import os
import pathlib
import threading

import numpy as np
import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import conversion, convert, draft, manifest
from scripts import bench_conversion
from tests.checkpoint import killed, published
from tests.checkpoint.published import original_config

Q = "model.layers.2.self_attn.q_proj.weight"


def _source(tmp_path, **changes):
    config = original_config(**changes)
    tensors = published.tensors(config)
    (directory := published.write_directory(tmp_path / "src", config, tensors, shards=2))
    (directory / "tokenizer.json").write_text("{}")
    return directory, tensors


def _files(directory) -> dict[str, bytes]:
    """Every file but the manifest, which names the directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in pathlib.Path(directory).rglob("*")
        if path.is_file() and path.name != manifest.NAME
    }


@pytest.mark.parametrize("format", ["hf-original", "orbax"])
def test_killed_at_20_random_moments_it_resumes_and_the_result_is_identical(tmp_path, format):
    trials, seed = 20, 1
    source, tensors = _source(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    found = killed.run("kill", source, out, format, trials, seed)
    whole = manifest.read(out / "whole")
    for number, trial in enumerate(found["trials"]):
        print(trial)
        assert trial["first"] == {"killed": True}
        assert "error" not in trial["second"]
        # What was finished is not written again.
        assert trial["second"]["written"] < found["whole"]["written"] or not trial["units"]
        dst = out / f"trial-{number}"
        again = manifest.read(dst)
        assert (again.arrays, again.origin) == (whole.arrays, whole.origin)
        if format == "orbax":
            # Orbax gives its files random names.
            assert (dst / "hybrid_jax.json").read_bytes() == (
                out / "whole" / "hybrid_jax.json"
            ).read_bytes()
            convert(dst, tmp_path / "back", "hf-original", overwrite=True)
            assert published.read_directory(tmp_path / "back") == published.stored(tensors)
        else:
            assert _files(dst) == _files(out / "whole")
    assert sorted(os.listdir(out)) == sorted(["whole", *(f"trial-{n}" for n in range(trials))])


def test_two_processes_read_and_write_about_half_each(tmp_path):
    # 80 MB, of which what a process needs to begin is little.
    source = tmp_path / "src"
    bench_conversion.write(source, 80e6, 8, 2)
    tensors = published.read_directory(source)
    out = tmp_path / "out"
    out.mkdir()
    total = sum(len(data) for _, _, data in tensors.values())
    found = killed.run("together", source, out, "hf-original", 5_000_000)
    for process in found["processes"]:
        # A shard more or less, headers, and what Python itself reads.
        for count in (*process["io"].values(), process["written"]):
            assert 0.4 < count / total < 0.6, (found, total)
    assert sum(process["written"] for process in found["processes"]) == total
    assert published.read_directory(out / "dst") == tensors
    manifest.verify(out / "dst")
    convert(source, tmp_path / "alone", "hf-original", shard_bytes=5_000_000)
    assert _files(out / "dst") == _files(tmp_path / "alone")
    assert os.listdir(out) == ["dst"]


def test_local_workers_make_the_same_directory(tmp_path, monkeypatch):
    source, _ = _source(tmp_path)
    # Models come with modules of theirs; nobody imports what lies in the working directory.
    (source / "xxhash.py").write_text("raise ImportError('a module of the source')")
    monkeypatch.chdir(source)
    heard = []
    hear = lambda done, total, name: heard.append((done, total, name))
    for workers in (1, 2):
        dst = tmp_path / str(workers)
        summary = convert(source, dst, "hf-original", None, hear, workers=workers, shard_bytes=4000)
        assert summary.written == summary.bytes == heard[-1][0] == heard[-1][1]
    assert _files(tmp_path / "1") == _files(tmp_path / "2")
    # What goes wrong in a worker is said as if there were none. The last tensors are its share.
    damaged = source / "model-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\xff\x7f")
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors: tensor .* holds 1 values"):
        convert(source, tmp_path / "bad", "hf-original", workers=2, shard_bytes=4000)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "src"]


def _fill_after(monkeypatch, count):
    """The disk is full after so many writes."""
    real, calls = os.pwrite, []

    def full(fd, data, place):
        calls.append(place)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        return real(fd, data, place)

    monkeypatch.setattr(os, "pwrite", full)


def test_a_full_disk_keeps_finished_units_and_only_the_same_conversion_goes_on(
    tmp_path, monkeypatch
):
    source, tensors = _source(tmp_path)
    dst, said = tmp_path / "dst", []
    start = lambda **options: convert(
        source, dst, "hf-original", note=said.append, **{"shard_bytes": 4000} | options
    )
    _fill_after(monkeypatch, 40)
    with pytest.raises(OSError, match="No space left on device while writing"):
        start()
    monkeypatch.undo()
    assert "3 units" in said[-1] and str(draft.place(dst)) in said[-1]
    assert sorted(os.listdir(tmp_path)) == [".dst.draft", "src"]
    # Other options, and another source, would not fit what is there.
    for options, what in (({"shard_bytes": 5000}, "layout"), ({"dtype": "float32"}, "options")):
        with pytest.raises(ValueError, match=f"not the same .*{what}.*rm -r .*draft"):
            start(**options)
    times = (source / "tokenizer.json").stat()
    os.utime(source / "tokenizer.json", ns=(0, 0))
    with pytest.raises(ValueError, match=r"not the same source\. Go on as it was begun"):
        start()
    os.utime(source / "tokenizer.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    # A unit that is no longer whole is written again.
    unit = draft.place(dst) / "content" / "model-00002-of-00005.safetensors"
    whole = unit.read_bytes()
    unit.write_bytes(whole[:-1])
    summary = start(check_finite=False)
    assert said[-1] == "2 of 5 units are finished already; going on with the rest."
    assert 0 < summary.written < summary.bytes
    assert (dst / unit.name).read_bytes() == whole
    assert published.read_directory(dst) == published.stored(tensors)
    manifest.verify(dst)
    # Once more: it is done.
    assert start().written == 0 and "is this conversion already" in said[-1]
    (dst / unit.name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="exists and is not empty"):
        start()
    assert start(overwrite=True).written == summary.bytes
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_a_bad_source_leaves_nothing_though_units_were_finished(tmp_path):
    config = original_config()
    tensors = published.tensors(config)
    tensors[Q][3, 2] = np.nan
    source = published.write_directory(tmp_path / "src", config, tensors)
    seen = []
    with pytest.raises(ValueError, match=f"{Q}' holds 1 values"):
        convert(
            source,
            tmp_path / "dst",
            "hf-original",
            shard_bytes=2000,
            progress=lambda *_: seen.append(len(list(tmp_path.glob(".dst.draft/units/*")))),
        )
    assert max(seen) > 1 and os.listdir(tmp_path) == ["src"]


def test_processes_may_come_one_after_the_other_and_process_0_finishes(tmp_path):
    source, tensors = _source(tmp_path)
    dst, said = tmp_path / "dst", []
    start = lambda process, of=2, **options: convert(
        source, dst, "hf-original", shard_bytes=4000, process=process, of=of, **options
    )
    assert not start(1).is_complete and not dst.exists()
    last = start(0)
    assert last.is_complete and published.read_directory(dst) == published.stored(tensors)
    # One that is started again when all is done finds it so, whether it may overwrite or not.
    for overwrite in (False, True):
        late = start(1, note=said.append, overwrite=overwrite)
        assert late.is_complete and late.written == 0 and "already" in said.pop()
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    for process, of in ((2, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="process must be"):
            start(process, of)


def test_one_process_that_fails_ends_all(tmp_path, monkeypatch):
    config = original_config()
    tensors = published.tensors(config)
    tensors["model.norm.weight"][1] = np.inf
    source = published.write_directory(tmp_path / "src", config, tensors)
    errors = {}

    def start(process, **options):
        try:
            convert(
                source,
                tmp_path / "dst",
                "hf-original",
                shard_bytes=4000,
                process=process,
                of=2,
                **options,
            )
        except (ValueError, OSError) as error:
            errors[process] = error

    # The bad tensor is in the first one's share. The second one is at its first tensor meanwhile.
    began, failed = threading.Event(), threading.Event()
    hold = lambda *_: (began.set(), failed.wait(60))
    second = threading.Thread(target=start, args=(1,), kwargs={"progress": hold})
    second.start()
    assert began.wait(60)
    with pytest.raises(BlockingIOError, match=r"is being written by process \d+ on "):
        convert(source, tmp_path / "dst", "hf-original", shard_bytes=4000, process=1, of=2)
    with pytest.raises(ValueError, match="another number of processes than 3"):
        convert(source, tmp_path / "dst", "hf-original", shard_bytes=4000, process=0, of=3)
    start(0)
    assert (tmp_path / ".dst.draft").exists()
    failed.set()
    second.join()
    assert "model.norm.weight" in str(errors[0])
    assert str(errors[1]) == f"process 0 of 2: {errors[0]}"
    assert os.listdir(tmp_path) == ["src"]


def test_process_0_does_not_wait_for_one_that_ended_with_an_error(tmp_path, monkeypatch):
    source, tensors = _source(tmp_path)
    dst = tmp_path / "dst"
    start = lambda process: convert(
        source, dst, "hf-original", shard_bytes=4000, process=process, of=2
    )
    waits, real = [], draft.time.sleep

    def sleep(seconds):
        # While the first one waits, the second one has no space.
        if not waits:
            waits.append(seconds)
            with pytest.MonkeyPatch.context() as patch:
                _fill_after(patch, 5)
                with pytest.raises(OSError, match="No space"):
                    start(1)
        real(seconds)

    monkeypatch.setattr(draft.time, "sleep", sleep)
    with pytest.raises(OSError, match=r"process 1 of 2: .*No space.*Start that process again, and"):
        start(0)
    assert not dst.exists()
    start(1)
    assert start(0).written == 0
    assert published.read_directory(dst) == published.stored(tensors)


def test_the_command_is_one_of_several_as_options_or_the_environment_say(
    tmp_path, capsys, monkeypatch
):
    source, tensors = _source(tmp_path)
    dst = tmp_path / "dst"
    command = ["convert", str(source), str(dst), "--format", "hf", "--shard-gb", "0.000004"]
    assert cli.main([*command, "--of", "2"]) == 2
    assert "--process and --of go together" in capsys.readouterr().err
    assert cli.main([*command, "--process", "1", "--of", "2"]) == 0
    said = capsys.readouterr().out
    assert "process 1 of 2 wrote 0.001 GB of" in said and "process 0 finishes when all" in said
    for name, value in (
        ("COORDINATOR_ADDRESS", "a:1"),
        ("NUM_PROCESSES", "2"),
        ("PROCESS_ID", "0"),
    ):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert cli.main(command) == 0
    assert "process 0 of 2" in capsys.readouterr().out
    found = published.read_directory(dst)
    assert {name: found[name] for name in tensors} == published.stored(tensors)


@pytest.mark.parametrize("there", ["a file", None, "[1]", "{", "[" * 20000])
def test_what_is_no_draft_is_neither_used_nor_removed(tmp_path, there):
    source, _ = _source(tmp_path)
    work = draft.place(tmp_path / "dst")
    if there == "a file":
        work.write_text(there)
    else:
        work.mkdir()
        (work / "mine").write_text("precious")
        if there is not None:
            (work / "content").mkdir()
            (work / "conversion.json").write_text(there)
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=r"is no unfinished checkpoint .*choose another"):
        convert(source, tmp_path / "dst", "hf-original")
    assert _files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == [work.name, "src"]


def test_two_that_begin_at_once_as_the_same_process_mix_nothing_up(tmp_path, monkeypatch):
    source, tensors = _source(tmp_path)
    real, both, answers = conversion.Conversion.prepare, threading.Barrier(2), []

    def prepare(self, directory):
        real(self, directory)
        # As long as the other one might want to begin, and remove what it takes for leftovers.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    monkeypatch.setattr(conversion.Conversion, "prepare", prepare)

    def start():
        try:
            answers.append(convert(source, tmp_path / "dst", "hf-original").tensors)
        except Exception as error:
            answers.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The other one came too late.
    assert len(tensors) in answers, answers
    assert all(each == len(tensors) or isinstance(each, OSError) for each in answers), answers
    assert published.read_directory(tmp_path / "dst") == published.stored(tensors)
    manifest.verify(tmp_path / "dst")
    assert {"config.json", "tokenizer.json"} <= set(os.listdir(tmp_path / "dst"))
