"""Convert a checkpoint directory tensor by tensor, in the memory of a few tensors."""

import os
import pathlib
import time
import typing

from hybrid_jax.checkpoint import conversion as conversions
from hybrid_jax.checkpoint import draft as drafts
from hybrid_jax.checkpoint import plan as plans
from hybrid_jax.checkpoint import workers as workers_lib
from hybrid_jax.checkpoint.formats import folders
from hybrid_jax.checkpoint.formats.orbax import GROUP_BYTES
from hybrid_jax.checkpoint.formats.remote import is_remote
from hybrid_jax.checkpoint.formats.safetensors_writer import SHARD_BYTES
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.config import text

FORMATS = ("orbax", "hf", "hf-original", "hf-vl-01")
# More are somebody's slip.
_MOST_PROCESSES = 1024


class Summary(typing.NamedTuple):
    """What a conversion did."""

    tensors: int
    """Tensors of the destination."""
    bytes: int
    """Bytes of their data."""
    written: int
    """Of these, bytes that this process and its workers wrote; others wrote the rest, or earlier
    starts."""
    is_complete: bool
    """Whether the destination is there; process 0 of several makes it when all are done."""
    seconds: float
    """Wall time."""
    peak_rss_bytes: int
    """Most memory that this process ever held, libraries included, and its workers each."""


def convert(
    src,
    dst,
    format: str,
    dtype: str | None = None,
    progress=None,
    *,
    check_finite: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    group_bytes: int = GROUP_BYTES,
    workers: int | None = None,
    process: int = 0,
    of: int = 1,
    note=lambda said: None,
    language_only: bool = False,
) -> Summary:
    """Convert the checkpoint in `src` to a new directory `dst` in `format`.

    Killed or out of disk, the same call goes on from `.DST.draft`; a bad source leaves nothing.

    Args:
        src: Hugging Face directory (released names, transformers' `minimax`, M2; bf16 or FP8; one
            file or shards), also in storage (`s3://...`); Orbax as written by this package; or a
            training run, whose newest good checkpoint is taken, merged with what LoRA learnt.
        dst: Appears whole at the end, with the manifest of what was written, or not at all.
        format: `orbax`; `hf`, as transformers writes it, decay tables included; `hf-original`, as
            MiniMax released it; `hf-vl-01`, as MiniMax released the language part of VL-01.
        dtype: `float32` or `bfloat16`, of all but routers stored in float32; `fp8`: matrices of
            layers in blocks of 128 x 128 with scales, the rest bfloat16; None keeps all bytes.
        progress: Called as progress(done_bytes, total_bytes, tensor_name) after each tensor.
        check_finite: Refuse NaN and infinite weights.
        overwrite: Replace a non-empty `dst`.
        shard_bytes: Largest safetensors file, unless one tensor is larger.
        group_bytes: Most that is held of the tensors of an Orbax group, unless one is larger.
        workers: Local processes that share the work, each in the memory of a few tensors; None for
            as many as processors, at most 4, and one for each GB.
        process: Which of `of` processes this is that see the same files; 0 waits and finishes.
        note: Called with sentences about work that is there already, or waited for.
        language_only: Leave out the vision part of VL-01; without it such a source is refused.

    Raises:
        ValueError: what is wrong in `src`, naming file and tensor; or with the arguments.
        OSError: `dst` cannot be written, or the same conversion is under way. `dst` is as before.
    """
    start, sizes = time.perf_counter(), (shard_bytes, group_bytes)
    _check_arguments(src, dst, format, dtype, (workers, process, of))
    job = conversions.Job(folders.absolute(src), format, dtype, check_finite, *sizes, language_only)
    with open_checkpoint(src) as checkpoint:
        work = conversions.Conversion(job, checkpoint)
        me = {"process": process, "of": of}
        with drafts.begin(dst, work.origin, work.prepare, note, overwrite=overwrite, **me) as draft:
            written, peak = _write(work, draft, (process, of), workers, progress, note)
            if draft is not None and process == 0:
                draft.finish(work.layout, note, overwrite=overwrite)
    counts, seconds = [info.nbytes for info in work.plan.infos], time.perf_counter() - start
    return Summary(len(counts), sum(counts), written, not draft or process == 0, seconds, peak)


def check_format(format: str) -> None:
    """ValueError with near names if there is no such format."""
    if format not in FORMATS:
        raise ValueError(
            f"There is no format {format!r}.{text.near_names(str(format), FORMATS)} Formats: "
            f"{', '.join(FORMATS)}."
        )


def _write(
    work: conversions.Conversion,
    draft: drafts.Draft | None,
    process: tuple[int, int],
    workers: int | None,
    progress,
    note,
) -> tuple[int, int]:
    """Write what is left of a process's share: (bytes that this took, most memory of all)."""
    if draft is None:
        note("The destination is this conversion already, by its manifest and the sizes of files.")
        return 0, workers_lib.peak_rss_bytes()
    me, of = process
    share = conversions.shares(work.layout, range(len(work.layout.units)), of)[me]
    finished = draft.finished(share)
    left = [number for number in share if number not in finished]
    if finished:
        note(f"{len(finished)} of {len(share)} units are finished already; going on with the rest.")
    sizes = [sum(info.nbytes for info in unit.infos) for unit in work.layout.units]
    total = sum(sizes[number] for number in share)
    begun = done = sum(sizes[number] for number in finished)

    def told(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, name)

    shares = conversions.shares(work.layout, left, workers or workers_for(total - begun))
    peak = workers_lib.run(work, draft, process, shares, told)
    return done - begun, peak


def workers_for(nbytes: int) -> int:
    """How many local processes write so many bytes if nobody says."""
    # Less than 1 GB is written before another process has begun.
    return max(1, min(len(os.sched_getaffinity(0)), 4, nbytes // 10**9))


def _check_arguments(src, dst, format: str, dtype: str | None, counts) -> None:
    check_format(format)
    _check_counts(*counts)
    if dtype not in (None, *plans.DTYPES_TO):
        raise ValueError(f"dtype must be one of {', '.join(plans.DTYPES_TO)}; got {dtype!r}.")
    for what, path in (("source", src), ("destination", dst)):
        if not os.fspath(path):
            raise ValueError(f"The {what} must be a directory; got an empty path.")
    if is_remote(dst):
        raise ValueError(f"The destination must be on a disk; got {dst}. Copy it there afterwards.")
    try:
        os.fspath(dst).encode()
    except UnicodeEncodeError as error:
        # Orbax cannot write there, and no manifest could be read by others.
        raise ValueError(f"The destination's name must be UTF-8; got {str(dst)!r}.") from error
    if is_remote(src):
        return
    # Not Path.resolve, which raises where links run in a circle.
    src, dst = (pathlib.Path(os.path.realpath(path)) for path in (src, dst))
    if src == dst or src in dst.parents or dst in src.parents:
        raise ValueError(f"Source {src} and destination {dst} must be apart; one holds the other.")
    work = drafts.place(dst)
    for place in (src, *src.parents):
        if place.parent == work.parent and place.name.startswith(work.name):
            raise ValueError(
                f"Source {src} lies where the work on {dst} would lie. Choose another destination."
            )


def _check_counts(workers: int | None, process: int, of: int) -> None:
    if workers is not None and not 1 <= workers <= _MOST_PROCESSES:
        raise ValueError(f"workers must be from 1 to {_MOST_PROCESSES}; got {workers}.")
    if not 0 <= process < of <= _MOST_PROCESSES:
        raise ValueError(
            f"process must be a number from 0 to below `of`, how many there are, at most "
            f"{_MOST_PROCESSES}; got {process} of {of}."
        )
